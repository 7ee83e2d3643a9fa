"""The selector protocol: score K candidates given a prefix."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..backends.base import Need
from ..backends.fingerprint import module_fingerprint
from ..proposal import Proposal
from ..scheduling.language_model import LanguageModel
from ..scheduling.waits import Waiting, finish


class Selector(Protocol):
    """Ranks the SLM's candidates. Stateless: one selector serves many generations.

    Its ``repr``, where its class writes one, is part of the key of LangChain's cache and so tells every setting;
    without one, an object shares cached answers with no other.
    """

    def scores(self, proposal: Proposal) -> Tensor:
        """``[K]`` scores of ``proposal.candidates``, comparable to log-probabilities; the highest wins."""
        ...


class LearnedSelector(nn.Module):
    """Base of the trainable selectors: from a correction to a score.

    Args:
        base: the SLM.
        temperature: divides the scores; calibrated, so that their softmax is a probability.
        caution: nats by which another candidate must exceed the SLM's best token; calibrated, so that answers without
            mistakes do not change.

    Attributes:
        needs: what the base's backend must be capable of.
    """

    needs: ClassVar[tuple[Need, ...]]

    def __init__(self, base: LanguageModel, *, temperature: float = 1.0, caution: float = 0.0) -> None:
        super().__init__()
        self.base = base
        self.temperature, self.caution = temperature, caution

    def __repr__(self) -> str:
        calibrated = f"temperature={self.temperature}, caution={self.caution}"
        return f"{type(self).__name__}({self.base.name!r}, {calibrated}, weights={module_fingerprint(self)})"

    def scores(self, proposal: Proposal) -> Tensor:
        """``[K]``, see ``calibrated``."""
        return finish(self.scoring(proposal))

    @abstractmethod
    def scoring(self, proposal: Proposal) -> Waiting[Tensor]:
        """``scores``, to wait for."""
        ...

    def calibrated(self, slm: Tensor, correction: Tensor) -> Tensor:
        """Scores from the candidates' log-probabilities, best first, and corrections, all ``[..., K]``."""
        raw = slm + correction
        if self.caution:
            raw = torch.cat([raw[..., :1] + self.caution, raw[..., 1:]], -1)
        return raw / self.temperature


def scoring(selector: Selector, proposal: Proposal) -> Waiting[Tensor]:
    """A selector's scores; one that is no ``LearnedSelector`` computes them in one go, and blocks."""
    if isinstance(selector, LearnedSelector):
        return (yield from selector.scoring(proposal))
    return selector.scores(proposal)


def confidence_margin(scores: Tensor) -> float:
    """Probability of the best score minus that of the second after a softmax, in [0, 1]; 1 for a single candidate."""
    best = scores.softmax(0).topk(min(2, scores.shape[0])).values.tolist()
    return float(best[0] - best[1]) if len(best) > 1 else 1.0
