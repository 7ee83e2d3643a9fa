"""Sampling: one token of all logits, or one of the K candidates by their scores, with temperature, top-p and a seed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Sampling

HEAD = 1024
"""Tokens that top-p orders at first; the whole vocabulary only where these hold less than its mass."""


class Draw:
    """Draws tokens by a ``Sampling``; greedy never touches a random generator."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.random = sampling.temperature > 0
        self._generator = torch.Generator()
        if sampling.seed is not None:
            self._generator.manual_seed(sampling.seed)
        else:
            self._generator.seed()

    def one_of(self, scores: Tensor) -> int:
        """A position among scores, with temperature and top-p: logits ``[V]``, or those of the candidates ``[K]``."""
        probs = self._probs(scores.float().cpu())
        if self.sampling.top_p < 1:
            probs = nucleus(probs, self.sampling.top_p)
        return int(torch.multinomial(probs, 1, generator=self._generator))

    def _probs(self, scores: Tensor) -> Tensor:
        """Probabilities at the temperature; the likeliest alone where it is too small for float32."""
        below_best = scores - scores.max()  # no positive number is left that could overflow
        return (below_best / max(self.sampling.temperature, torch.finfo(torch.float32).tiny)).softmax(0)


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Probabilities with 0 for all but the likeliest that together reach ``top_p``."""
    ordered, order = probs.topk(min(HEAD, len(probs)))
    if ordered.sum() < top_p:
        ordered, order = probs.sort(descending=True)
    beyond = ordered.cumsum(0) - ordered >= top_p  # keeps the token that crosses the mass
    beyond[0] = False  # a tiny top_p is 0 in float32
    return torch.zeros_like(probs).scatter(0, order, ordered.masked_fill(beyond, 0.0))
