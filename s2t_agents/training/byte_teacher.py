"""An LLM of another family as teacher: it scores the candidates' bytes at every step, as a ``LocalLLM`` that is asked.

Each step is a question of its own over the KV of the one before. Of the LLM only the K candidates are known: its best
token is the best of these, and KL is that of the candidates and of all else as one, a lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.statistics import FLOOR
from ..llms.local_llm import LocalLLM
from ..llms.question import Conversation, Question
from ..scheduling.language_model import LanguageModel
from ..scheduling.sequence import TokenSequence
from .labels import Opinion, Trajectory
from .shards import ModelIdentity

LEAST = 1e-9
"""Probability of all tokens but the candidates, at least."""


class ByteTeacher:
    """A model with another tokenizer than the SLM's (see ``labels.Teacher``).

    Args:
        model: loaded.
        slm: whose candidates it scores.

    Raises:
        TokenizerMismatch: a tokenizer that cannot be followed byte by byte.
    """

    def __init__(self, model: LanguageModel, slm: LanguageModel) -> None:
        self._slm = slm
        self._llm = LocalLLM(model)
        self._llm.check(slm)
        self.identity = ModelIdentity.of(model)

    def opinions(
        self,
        trajectories: Sequence[Trajectory],
        slm: Sequence[Tensor],
        candidates: Sequence[Tensor],
        conversations: Sequence[Conversation] | None = None,
    ) -> list[Opinion]:
        """See ``Teacher``; without conversations it reads prompts as plain text.

        Raises:
            EscalationFailed: it cannot be asked: a text that it cannot write, or one that is too long for it.
        """
        asked: Sequence[Conversation | None] = conversations or [None] * len(trajectories)
        rows = zip(trajectories, slm, candidates, asked, strict=True)
        return [self._along(*row) for row in rows]

    def _along(
        self, trajectory: Trajectory, slm: Tensor, candidates: Tensor, conversation: Conversation | None
    ) -> Opinion:
        prompt, ids = trajectory
        session, prefix = (
            self._llm.open(),
            TokenSequence(self._slm),
        )  # which nobody reads: it says whose tokens these are
        scores = torch.full(candidates.shape, FLOOR)
        try:
            for at, row in enumerate(candidates.tolist()):
                legal = [k for k, token in enumerate(row) if float(slm[at, token]) > FLOOR]
                if len(legal) < 2:  # forced: the models agree
                    scores[at, legal] = 0.0
                    continue
                asked = Question(
                    [*prompt, *ids[:at]], [row[k] for k in legal], prefix=prefix, conversation=conversation
                )
                given = session.ask(asked).scores
                scores[at, legal] = torch.tensor([FLOOR if score is None else max(FLOOR, score) for score in given])
        finally:
            session.close()
            prefix.close()
        best = candidates.gather(1, scores.to(candidates.device).argmax(1, keepdim=True))[:, 0]
        divergence = [_coarse_kl(*pair) for pair in zip(scores, slm.gather(1, candidates).cpu(), strict=True)]
        return Opinion(scores.to(slm.device), best, torch.tensor(divergence, device=slm.device))


def _coarse_kl(llm: Tensor, slm: Tensor) -> float:
    """KL(LLM || SLM) in nats of K candidates, ``[K]`` log-probabilities each, and of everything else as one."""
    theirs, ours = llm.double().exp(), slm.double().exp()
    if float(theirs.sum()) >= 1 - LEAST:  # forced, or rounding
        theirs = theirs / theirs.sum()
    rest, others = max(LEAST, 1 - float(theirs.sum())), max(LEAST, 1 - float(ours.sum()))
    known = float((theirs * (theirs.clamp_min(LEAST).log() - ours.clamp_min(LEAST).log())).sum())
    return max(0.0, known + rest * math.log(rest / others))
