"""What an engine asks of every step first: best token, entropy and margin, fetched in one trip."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = -1e4
"""Log-probability from which on a probability is 0 in fp32."""


@dataclass(frozen=True)
class LogitStatistics:
    """One step's distribution in three numbers.

    Attributes:
        best: the likeliest token.
        entropy: nats.
        margin: probability of the likeliest token minus that of the second, in [0, 1].
    """

    best: int
    entropy: float
    margin: float


def logit_statistics(logits: Tensor, best: Tensor, top: Tensor) -> Tensor:
    """Best token, entropy and margin ``[N, 3]``; float64 holds every token id exactly.

    Args:
        logits: ``[N, V]``, illegal tokens at -inf.
        best: ``[N, 1]``, the likeliest tokens.
        top: ``[N, 1]``, their logits.
    """
    below = logits - top
    weights = below.exp()
    total = weights.sum(-1, keepdim=True)
    entropy = total.log() - (weights * below.clamp_min(FLOOR)).sum(-1, keepdim=True) / total
    columns = torch.arange(logits.shape[-1], device=logits.device)
    second = torch.where(columns == best, -torch.inf, below).amax(-1, keepdim=True)
    return torch.cat([best.double(), entropy.double(), ((1 - second.exp()) / total).double()], -1)


def statistics_of_rows(rows: Tensor) -> list[LogitStatistics]:
    """From ``[N, 3]`` of ``logit_statistics``; waits for the device."""
    return [LogitStatistics(int(best), entropy, margin) for best, entropy, margin in rows.tolist()]


def statistics_at(logits: Tensor) -> LogitStatistics:
    """Of one step's ``[V]``."""
    best = logits.argmax()[None, None]
    return statistics_of_rows(logit_statistics(logits[None], best, logits[best]))[0]
