"""Sums of records. Everything is added exactly, so any grouping adds up to the same whole."""

from __future__ import annotations

import threading
from decimal import Decimal
from typing import Annotated, Any

from pydantic import Field, computed_field

from s2t_agents.budget import money
from s2t_agents.ledger.record import DIGITS, Frozen, GenerationRecord, Latency

PARTS = tuple(Latency.model_fields)


class CostSum(Frozen):
    """Dollars added up, and how many of the added costs nobody knew.

    Args:
        known: the sum of the known ones, in USD.
        unknown: how many were unknown.
    """

    known: Annotated[Decimal, DIGITS] = Decimal(0)
    unknown: int = 0

    @computed_field  # type: ignore[prop-decorator]
    @property
    def usd(self) -> Annotated[Decimal | None, DIGITS]:
        """The sum in USD; None if any part of it is unknown."""
        return None if self.unknown else self.known

    def __add__(self, other: CostSum) -> CostSum:
        return CostSum(known=money.add(self.known, other.known), unknown=self.unknown + other.unknown)


class CostSums(Frozen):
    """Local, LLM and together."""

    local: CostSum = CostSum()
    llm: CostSum = CostSum()
    total: CostSum = CostSum()

    def __add__(self, other: CostSums) -> CostSums:
        return CostSums(local=self.local + other.local, llm=self.llm + other.llm, total=self.total + other.total)


class Totals(Frozen):
    """The sum of some records; ``a + b`` adds, ``Totals()`` is nothing.

    ``failed`` counts receipts whose LLM call failed, ``interrupted`` those whose caller left meanwhile, ``errors``
    generations that ended in an error, ``latency_us`` sums every part in whole microseconds over the generations that
    measured it.
    """

    generations: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    triggers: int = 0
    selections: int = 0
    flips: int = 0
    escalations: int = 0
    refused: int = 0
    failed: int = 0
    interrupted: int = 0
    degraded: int = 0
    cached: int = 0
    errors: int = 0
    cost_usd: CostSums = CostSums()
    latency_us: dict[str, int] = Field(default_factory=dict)

    def __add__(self, other: Totals) -> Totals:
        parts = {**self.latency_us}
        for part, micros in other.latency_us.items():
            parts[part] = parts.get(part, 0) + micros
        counts: dict[str, Any] = {name: getattr(self, name) + getattr(other, name) for name in COUNTS}
        return Totals(**counts, cost_usd=self.cost_usd + other.cost_usd, latency_us=parts)

    def __radd__(self, other: Any) -> Totals:
        """Lets ``sum(totals)`` start from 0."""
        return self if other == 0 else NotImplemented


COUNTS = tuple(name for name in Totals.model_fields if name not in ("cost_usd", "latency_us"))


def totals_of(record: GenerationRecord) -> Totals:
    """One record as a sum of one."""
    cost, times = record.cost_usd, record.latency_ms
    micros = {part: round(ms * 1000) for part in PARTS if (ms := getattr(times, part)) is not None}
    free = record.cached
    return Totals(
        generations=1,
        prompt_tokens=record.prompt_tokens,
        completion_tokens=record.completion_tokens,
        triggers=record.triggers,
        selections=record.selections,
        flips=record.flips,
        escalations=record.escalations,
        refused=record.refused,
        failed=sum(receipt.outcome == "failed" for receipt in record.receipts),
        interrupted=sum(receipt.outcome == "interrupted" for receipt in record.receipts),
        degraded=int(record.degraded),
        cached=int(record.cached),
        errors=int(record.error is not None),
        cost_usd=CostSums(local=_one(cost.local, free), llm=_one(cost.llm, free), total=_one(cost.total, free)),
        latency_us=micros,
    )


def _one(usd: Decimal | None, free: bool) -> CostSum:
    if usd is None and not free:
        return CostSum(unknown=1)
    return CostSum(known=usd or Decimal(0))


class RunningTotal:
    """A sum that grows while a ``with ledger.scope()`` block runs. Safe to read from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now = Totals()

    def add(self, record: GenerationRecord) -> None:
        """Count one more record."""
        with self._lock:
            self._now = self._now + totals_of(record)

    @property
    def now(self) -> Totals:
        """The total at this moment."""
        return self._now
