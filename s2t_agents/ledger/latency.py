"""Percentiles of where the time went."""

from __future__ import annotations

import math
from collections.abc import Iterable

from s2t_agents.ledger.record import Frozen, GenerationRecord
from s2t_agents.ledger.totals import PARTS


class Quantiles(Frozen):
    """Of one part of the latency, in ms. Nearest rank: each is a value that really occurred."""

    count: int
    p50: float
    p95: float
    p99: float


def quantiles(values: Iterable[float]) -> Quantiles | None:
    """p50, p95, p99 of some milliseconds; None of none."""
    ordered = sorted(values)
    if not ordered:
        return None
    p50, p95, p99 = (ordered[math.ceil(share * len(ordered) / 100) - 1] for share in (50, 95, 99))
    return Quantiles(count=len(ordered), p50=p50, p95=p95, p99=p99)


def latency_split(records: Iterable[GenerationRecord]) -> dict[str, Quantiles]:
    """Quantiles of every part that was measured at least once; answers from the cache are left out."""
    samples: dict[str, list[float]] = {part: [] for part in PARTS}
    for record in records:
        if record.cached:
            continue
        for part in PARTS:
            if (ms := getattr(record.latency_ms, part)) is not None:
                samples[part].append(ms)
    return {part: found for part, values in samples.items() if (found := quantiles(values)) is not None}
