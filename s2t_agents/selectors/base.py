"""The question every selector answers: which of these K candidates, given this prefix?"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from ..backends.torch.language_model import LanguageModel
from ..proposal import Proposal


class Selector(Protocol):
    """Ranks the SLM's candidates. Stateless: one selector serves many generations."""

    def scores(self, proposal: Proposal) -> Tensor:
        """``[K]`` scores of ``proposal.candidates``, comparable to log-probabilities; the highest wins."""
        ...


class LearnedSelector(nn.Module):
    """What the trainable kinds share: how a correction becomes a score.

    Args:
        base: the SLM.
        temperature: divides the scores; calibrated, so that their softmax means a probability.
        caution: nats by which another candidate must beat the SLM's own token; calibrated, so that answers with
            nothing to fix stay as they are.
    """

    def __init__(self, base: LanguageModel, *, temperature: float = 1.0, caution: float = 0.0) -> None:
        super().__init__()
        self.base = base
        self.temperature, self.caution = temperature, caution

    def calibrated(self, slm: Tensor, correction: Tensor) -> Tensor:
        """``[..., K]`` scores from the candidates' log-probabilities, best first, and their corrections."""
        raw = slm + correction
        if self.caution:
            raw = torch.cat([raw[..., :1] + self.caution, raw[..., 1:]], -1)
        return raw / self.temperature


def confidence_margin(scores: Tensor) -> float:
    """How far the best stands above the second after a softmax, in [0, 1]; 1 for a single candidate."""
    best = scores.softmax(0).topk(min(2, scores.shape[0])).values.tolist()
    return float(best[0] - best[1]) if len(best) > 1 else 1.0
