"""The percentiles that are kept of a latency; `grouped_totals` computes them."""

from __future__ import annotations

import math

from .record import Frozen


class Quantiles(Frozen):
    """Of one part of the latency, in ms. Nearest rank: each is a value that really occurred."""

    count: int
    p50: float
    p95: float
    p99: float


SHARES = (50, 95, 99)


def percentile_rank(count: int, share: int) -> int:
    """The position of a percentile among so many ordered values."""
    return math.ceil(share * count / 100) - 1
