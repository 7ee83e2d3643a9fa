"""Ranks and calibration: the few statistics that the reports need."""

from __future__ import annotations

import torch
from torch import Tensor


def roc_auc(scores: Tensor, positive: Tensor) -> float | None:
    """Chance that a positive step scores above a negative one (ties count half); None without both.

    Args:
        scores: ``[N]``.
        positive: ``[N]`` bool.
    """
    p = int(positive.sum())
    n = len(positive) - p
    if not p or not n:
        return None
    _, inverse, counts = torch.unique(scores.double(), return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[inverse]
    return float((ranks[positive].sum() - p * (p + 1) / 2) / (p * n))


def best_temperature(scores: Tensor, right: Tensor) -> float:
    """The temperature at which softmax(scores / T) gives the right candidates the highest likelihood.

    Args:
        scores: ``[M, K]``.
        right: ``[M]``, position of the right one.
    """
    grid = torch.logspace(-1.5, 1.5, 121).tolist()
    losses = [float(torch.nn.functional.cross_entropy(scores.float() / t, right)) for t in grid]
    return float(grid[losses.index(min(losses))])


def reliability(confidence: Tensor, right: Tensor, bins: int = 10) -> tuple[tuple[float, float, int], ...]:
    """(mean confidence, share right, count) for each of ``bins`` equal parts of [0, 1] that holds anything."""
    rows = []
    place = (confidence * bins).long().clamp_max(bins - 1)
    for at in range(bins):
        inside = place == at
        if count := int(inside.sum()):
            mean, share = float(confidence[inside].mean()), float(right[inside].float().mean())
            rows.append((round(mean, 4), round(share, 4), count))
    return tuple(rows)
