"""The question every selector answers: which of these K candidates, given this prefix?"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..proposal import Proposal


class Selector(Protocol):
    """Ranks the SLM's candidates. Stateless: one selector serves many generations."""

    def scores(self, proposal: Proposal) -> Tensor:
        """``[K]`` scores of ``proposal.candidates``, comparable to log-probabilities; the highest wins."""
        ...


def confidence_margin(scores: Tensor) -> float:
    """How far the best stands above the second after a softmax, in [0, 1]; 1 for a single candidate."""
    best = scores.softmax(0).topk(min(2, scores.shape[0])).values.tolist()
    return float(best[0] - best[1]) if len(best) > 1 else 1.0
