"""What SLM and LLM say along a trajectory: each model reads it once (answers to one prompt share its reading), and only
the K candidates are kept."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..backends.completions.backend import CompletionsBackend
from ..backends.completions.faults import model_server_errors
from ..backends.fingerprint import shared_ids
from ..backends.statistics import FLOOR
from ..errors import TokenizerMismatch
from ..grammar.grammar import Grammar
from ..llms.question import Conversation
from ..proposal import best_first, entropy_of
from ..scheduling.language_model import LanguageModel
from .batch_reading import logits_along
from .batching import batches_of_dialogues, dialogues
from .served_reading import Listed, ServedReader
from .shards import ModelIdentity
from .stepwise import outputs_along

Trajectory = tuple[list[int], list[int]]
"""Prompt ids and completion ids."""

LEAST_REST = 1e-9
"""Probability that the tokens together have which a server does not list, at least."""


@dataclass(frozen=True)
class Opinion:
    """The LLM on n steps of one trajectory.

    Attributes:
        candidates: ``[n, K]`` log-probabilities of the SLM's candidates.
        best: ``[n]`` the LLM's own best tokens.
        kl: ``[n]`` KL(LLM || SLM) in nats.
    """

    candidates: Tensor
    best: Tensor
    kl: Tensor


class Teacher(Protocol):
    """An LLM that labels trajectories: a ``LocalTeacher``, a ``ByteTeacher`` of another family, a ``RemoteTeacher``."""

    identity: ModelIdentity

    def opinions(
        self,
        trajectories: Sequence[Trajectory],
        slm: Sequence[Tensor],
        candidates: Sequence[Tensor],
        conversations: Sequence[Conversation] | None = None,
    ) -> list[Opinion]:
        """One per trajectory, given the SLM's log-probabilities ``[n, V]`` and candidates ``[n, K]`` along each.

        What the SLM holds at ``FLOOR`` is illegal there, and is for the LLM too. An LLM of another family reads the
        conversations that the prompts were made of.
        """
        ...


@dataclass(frozen=True)
class Labels:
    """Everything kept of one trajectory's n steps; fields as in ``shards.Shard``."""

    candidates: Tensor
    slm: Tensor
    llm: Tensor
    llm_best: Tensor
    kl: Tensor
    entropy: Tensor


def label(
    slm: LanguageModel,
    teacher: Teacher,
    trajectories: Sequence[Trajectory],
    k: int,
    grammars: Sequence[Grammar | None] | None = None,
    conversations: Sequence[Conversation] | None = None,
    done: Callable[[Sequence[int]], None] = lambda batch: None,
) -> list[Labels]:
    """Label all steps of all trajectories, in their order.

    Args:
        slm: proposes the candidates.
        teacher: the LLM.
        trajectories: prompts and completions.
        k: candidates per step.
        grammars: under which each completion was made, just started: both models are then seen through them, as
            the engine sees the SLM. Illegal candidates are at ``FLOOR``; where a token is forced, the models agree.
        conversations: that the prompts were made of, for a teacher of another family.
        done: told the places of trajectories as they are labelled.
    """
    labels: list[Labels | None] = [None] * len(trajectories)
    rows, prompts = [prompt + ids for prompt, ids in trajectories], [prompt for prompt, _ in trajectories]
    for batch in batches_of_dialogues(rows, prompts=prompts):
        part = [trajectories[at] for at in batch]
        ours = along(slm, part)
        if grammars is not None:
            ours = [
                under(grammar, ids, log_probs)
                for grammar, (_, ids), log_probs in zip((grammars[at] for at in batch), part, ours, strict=True)
            ]
        tops = [best_first(log_probs, k) for log_probs in ours]
        asked = None if conversations is None else [conversations[at] for at in batch]
        opinions = teacher.opinions(part, ours, [candidates for _, candidates in tops], asked)
        for at, log_probs, (values, candidates), opinion in zip(batch, ours, tops, opinions, strict=True):
            entropy = entropy_of(log_probs)
            labels[at] = Labels(candidates, values, opinion.candidates, opinion.best, opinion.kl, entropy)
        done(batch)
    return [each for each in labels if each is not None]


def check_same_ids(slm: LanguageModel, tokenizer: Any, name: str) -> None:
    """Refuse an LLM whose token ids are not the SLM's.

    Args:
        slm: the small model.
        tokenizer: of the LLM.
        name: of the LLM, for the error.

    Raises:
        TokenizerMismatch: naming the first token that differs.
    """
    if differing := shared_ids(slm.tokenizer, tokenizer):
        raise TokenizerMismatch(
            f"{name!r} and {slm.name!r} disagree on {len(differing)} token ids, {differing[0]!r} first.",
            hint="Use an LLM of the same family.",
        )


class LocalTeacher:
    """An LLM on this machine: per batch of trajectories one forward for the prompts, one for the completions."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self.identity = ModelIdentity.of(model)

    def opinions(
        self,
        trajectories: Sequence[Trajectory],
        slm: Sequence[Tensor],
        candidates: Sequence[Tensor],
        conversations: Sequence[Conversation] | None = None,
    ) -> list[Opinion]:
        """See ``Teacher``. Padding rows of either vocabulary are left out."""
        found = []
        for theirs, ours, ids in zip(along(self._model, trajectories), slm, candidates, strict=True):
            theirs = theirs.to(ours.device)
            width = min(theirs.shape[1], ours.shape[1])
            theirs, ours = theirs[:, :width], ours[:, :width]
            theirs = theirs.masked_fill(ours <= FLOOR, -torch.inf).log_softmax(-1).clamp_min(FLOOR)
            kl = (theirs.exp() * (theirs - ours)).sum(-1).clamp_min(0)
            found.append(Opinion(theirs.gather(1, ids.clamp_max(width - 1)), theirs.argmax(-1), kl))
        return found


def under(grammar: Grammar | None, ids: Sequence[int], log_probs: Tensor) -> Tensor:
    """Log-probabilities ``[n, V]`` along a completion of n tokens, over what was legal; the rest at ``FLOOR``."""
    if grammar is None:
        return log_probs
    legal = torch.ones(log_probs.shape, dtype=torch.bool)
    forced: deque[int] = deque()
    for at, token in enumerate(ids):
        forced = forced or deque(grammar.forced())
        if forced:
            legal[at] = False
            legal[at, forced.popleft()] = True
        elif (allowed := grammar.allowed(log_probs[at])) is not None:
            legal[at] = allowed
        if at + 1 < len(ids):
            grammar.accept(token)
    outside = ~legal.to(log_probs.device)
    return log_probs.masked_fill(outside, -torch.inf).log_softmax(-1).clamp_min(FLOOR)


@torch.inference_mode()
def along(model: LanguageModel, trajectories: Sequence[Trajectory]) -> list[Tensor]:
    """Log-probabilities ``[n, V]`` of every completion step: each prompt is read once, then one forward for all.

    A model on a server reads there: of what it does not list, every token gets the same share of the rest (``spread``).
    Any other that does not run in torch reads token by token, through its scheduler.

    Args:
        model: is asked.
        trajectories: turns of one dialogue are neighbours.
    """
    if isinstance(model.backend, CompletionsBackend):
        return served_along(model.backend, trajectories)
    if model.library != "torch":
        return outputs_along(model, trajectories, lambda output: output.logits.log_softmax(-1))
    rows = [prompt + ids[:-1] for prompt, ids in trajectories]
    chains = dialogues(rows)
    starts = [trajectories[chain[0]][0] for chain in chains]
    rest = [rows[chain[-1]][len(start) :] for chain, start in zip(chains, starts, strict=True)]
    logits = logits_along(model, starts, rest)
    found = []
    for row, chain in enumerate(chains):
        before = logits.shape[1] - 1 - len(rest[row])  # the padding between a prompt and what follows
        for at in chain:
            prompt, ids = trajectories[at]
            first = len(prompt) - len(starts[row])
            said = logits[row, before + first : before + first + len(ids)]
            if not first:
                said = torch.cat([logits[row, :1], logits[row, before + 1 : before + len(ids)]])
            found.append(said.log_softmax(-1))
    return found


def served_along(backend: CompletionsBackend, trajectories: Sequence[Trajectory]) -> list[Tensor]:
    """``along`` for a model on a server.

    Raises:
        ModelServerError: no usable answer.
        BudgetExceeded: the backend's ``spending`` has no room for the next request.
    """
    reader = ServedReader(backend.endpoint, backend.served_name, backend.vocab_size, spending=backend.spending)
    with model_server_errors(backend.name):
        listed = listed_along(reader, trajectories)
    return [spread(rows, backend.vocab_size) for rows in listed]


def spread(rows: Sequence[Listed], vocab_size: int) -> Tensor:
    """Log-probabilities ``[n, V]`` from those listed at n steps: all other tokens share the rest alike.

    None of them is likelier than the last listed, so the entropy is at most a little above the true one.
    """
    found = torch.empty(len(rows), vocab_size)
    for at, row in enumerate(rows):
        rest = max(1.0 - sum(map(math.exp, row.values())), LEAST_REST)
        found[at] = math.log(rest / max(1, vocab_size - len(row)))
        found[at, list(row)] = torch.tensor(list(row.values())).clamp_min(FLOOR + 1)  # at FLOOR it would be illegal
    return found


def listed_along(
    reader: ServedReader, trajectories: Sequence[Trajectory], candidates: Sequence[Tensor] | None = None
) -> list[list[Listed]]:
    """What a server lists before each of the n tokens of every completion; a dialogue is read once.

    Args:
        reader: of the server.
        trajectories: turns of one dialogue are neighbours.
        candidates: ``[n, K]`` each, named where the server is asked by them; None names none.
    """
    rows = [prompt + ids for prompt, ids in trajectories]
    chains = dialogues(rows)
    wanted: list[dict[int, Sequence[int]]] = [
        {
            len(trajectories[at][0]) + step: () if candidates is None else candidates[at][step].tolist()
            for at in chain
            for step in range(len(trajectories[at][1]))
        }
        for chain in chains
    ]
    read = reader.read([rows[chain[-1]] for chain in chains], wanted)
    return [
        [listed[len(trajectories[at][0]) + step] for step in range(len(trajectories[at][1]))]
        for chain, listed in zip(chains, read, strict=True)
        for at in chain
    ]
