"""How far another backend or quantization of a selector's base is from the one it was calibrated on: both read a text.

The base that a selector was calibrated on reads a fixed text, and its best tokens and the selector's scores are kept
beside the selector. Another form of the same checkpoint reads the same tokens when the selector is loaded on it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from ..atomic_write import write_whole
from ..backends.torch.loading import read_tensors
from ..errors import AdapterMismatch
from ..proposal import Proposal
from ..scheduling.language_model import LanguageModel
from ..scheduling.sequence import TokenSequence
from .base import Selector
from .config import BaseIdentity, SelectorConfig

logger = logging.getLogger(__name__)

REFERENCE_FILE = "reference.safetensors"

TEXT = (
    'The weather in Paris was asked for, so the agent calls get_weather with {"city": "Paris", "days": 3}. On the '
    "first day it will rain, and on the second and third the sun will shine."
)
TOKENS = 32
"""Of the text that are read, one at a time, as an answer is written."""

K = 4
"""Candidates that are scored at each."""


@dataclass(frozen=True)
class Difference:
    """How two forms of one base differ, and a selector's scores on them.

    Attributes:
        agreement: share of the tokens after which both have the same best token.
        scores: mean difference of the selector's scores of the same candidates, in nats.
    """

    agreement: float
    scores: float


@dataclass(frozen=True)
class Reference:
    """Best tokens and a selector's scores along some tokens.

    Attributes:
        ids: ``[T]``.
        best: ``[T]``, the base's best token after each.
        candidates: ``[T, K]``, its candidates.
        scores: ``[T, K]``, the selector's of these.
    """

    ids: Tensor
    best: Tensor
    candidates: Tensor
    scores: Tensor

    @classmethod
    def of(cls, selector: Selector, base: LanguageModel, like: Reference | None = None) -> Reference:
        """Read the text.

        Args:
            selector: scores candidates on ``base``.
            base: reads the text.
            like: the tokens, and the candidates to be scored; None takes the fixed text and the base's own candidates.
        """
        given = base.tokenizer.encode(TEXT, add_special_tokens=False)[:TOKENS] if like is None else like.ids.tolist()
        best, candidates, scores = [], [], []
        sequence = TokenSequence(base)
        try:
            with torch.inference_mode():
                for at, token in enumerate(given):
                    sequence.append([token])
                    proposal = Proposal(sequence, K)
                    if like is not None:
                        proposal.candidates = like.candidates[at].long().to(base.device)
                    best.append(proposal.best)
                    candidates.append(proposal.candidates.cpu())
                    scores.append(selector.scores(proposal).float().cpu())
        finally:
            sequence.close()
        ids = torch.tensor(given, dtype=torch.int32)
        return cls(ids, torch.tensor(best, dtype=torch.int32), torch.stack(candidates).int(), torch.stack(scores))

    def difference(self, selector: Selector, base: LanguageModel) -> Difference:
        """Between this and the same selector on another form of the base."""
        other = Reference.of(selector, base, like=self)
        return Difference(
            agreement=float((other.best == self.best).float().mean()),
            scores=float((other.scores - self.scores).abs().mean()),
        )

    def save(self, folder: Path) -> None:
        """Write ``reference.safetensors`` into a selector's directory."""
        write_whole(folder / REFERENCE_FILE, save({name: each.contiguous() for name, each in vars(self).items()}))

    @classmethod
    def load(cls, folder: Path) -> Reference | None:
        """A directory's reference; None where an older version wrote it.

        Raises:
            UnsafeWeights, AdapterMismatch: a file that is none.
        """
        file = folder / REFERENCE_FILE
        if not file.exists():
            return None
        try:
            return cls(**read_tensors(file))
        except TypeError as error:
            raise AdapterMismatch(f"{file} is no reference of a selector: {error}.") from error


def warn_of_another_form(folder: Path, selector: Selector, base: LanguageModel, config: SelectorConfig) -> None:
    """Log one warning where the base is another form of the one that a selector was calibrated on, with the difference.

    Args:
        folder: of the selector.
        selector: loaded from there.
        base: that it was loaded on.
        config: of the selector.

    Raises:
        UnsafeWeights, AdapterMismatch: see ``Reference.load``.
    """
    actual, wanted = BaseIdentity.of(base), config.base
    if not actual.is_another_form_of(wanted):
        return
    reference = Reference.load(folder)
    if reference is None:
        how = "how far they differ is not known"
    else:
        found = reference.difference(selector, base)
        how = (
            f"on a text of {len(reference.ids)} tokens their best tokens agree at {found.agreement:.0%}, and the "
            f"selector's scores differ by {found.scores:.2f} nats"
        )
    logger.warning(
        "the selector at %s was calibrated on %r (%s, %s) and runs on %r (%s, %s): %s. "
        "`s2t calibrate` on rollouts of this one sets its thresholds anew.",
        folder, wanted.name, wanted.backend, wanted.quantization, base.name, actual.backend, actual.quantization, how,
    )  # fmt: skip
