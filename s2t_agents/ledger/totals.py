"""Sums of records. Everything is added exactly, so any grouping adds up to the same whole."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from decimal import Decimal
from operator import add, attrgetter
from typing import Annotated, Any

from pydantic import Field, computed_field

from ..budget import money
from ..fork_safety import hold_while_forking
from .record import DIGITS, Frozen, GenerationRecord, Latency

PARTS = tuple(Latency.model_fields)


class CostSum(Frozen):
    """Dollars added up, and how many of the added costs were unknown.

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
    """Local, LLM and together; of the LLM's, the part that went into thoughts."""

    local: CostSum = CostSum()
    llm: CostSum = CostSum()
    total: CostSum = CostSum()
    thought: CostSum = CostSum()

    def __add__(self, other: CostSums) -> CostSums:
        return CostSums(
            local=self.local + other.local,
            llm=self.llm + other.llm,
            total=self.total + other.total,
            thought=self.thought + other.thought,
        )


class Totals(Frozen):
    """The sum of some records; ``a + b`` adds, ``Totals()`` is nothing.

    ``failed`` counts receipts whose LLM call failed, ``interrupted`` those whose caller left meanwhile, ``errors``
    generations that ended in an error, ``latency_us`` sums every part in whole microseconds over the generations that
    measured it. What begins with ``thought`` is the part of the same sums that went into thoughts.
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
    thought_tokens: int = 0
    thought_triggers: int = 0
    thought_selections: int = 0
    thought_escalations: int = 0
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
_COUNTED: dict[str, Callable[[GenerationRecord], int]] = {
    "generations": lambda record: 1,
    "failed": lambda record: [receipt.outcome for receipt in record.receipts].count("failed"),
    "interrupted": lambda record: [receipt.outcome for receipt in record.receipts].count("interrupted"),
    "errors": lambda record: record.error is not None,
    "thought_tokens": lambda record: record.thought.tokens,
    "thought_triggers": lambda record: record.thought.triggers,
    "thought_selections": lambda record: record.thought.selections,
    "thought_escalations": lambda record: record.thought.escalations,
}
_read = attrgetter(*(name for name in COUNTS if name not in _COUNTED))
part_times = attrgetter(*PARTS)
_ORDER = [*(name for name in COUNTS if name not in _COUNTED), *_COUNTED]
_COSTS = tuple(CostSums.model_fields)
_AT_COSTS = len(COUNTS)
_AT_PARTS = _AT_COSTS + 2 * len(_COSTS)
_AT_EXPONENTS = _AT_PARTS + 2 * len(PARTS)

Sums = Sequence[int]
"""What ``Totals`` hold as whole numbers: counts; picodollars and unknown ones of each cost; microseconds and how many
measured them of each part; and the exponents that the costs were written with, of which the least is kept."""

NO_SUMS: Sums = (0,) * (_AT_EXPONENTS + len(_COSTS))


def sums_of(record: GenerationRecord) -> Sums:
    """One record as a sum of one. A count that a record has under the same name needs no line here."""
    cost, times = record.cost_usd, record.latency_ms
    sums = [*_read(record), *[count(record) for count in _COUNTED.values()]]
    costs = (cost.local, cost.llm, record.thought.llm_usd)
    local, llm, thought = ((Decimal(0) if usd is None and record.cached else usd) for usd in costs)
    total = None if local is None or llm is None else money.add(local, llm)
    exponents = []
    for usd in (local, llm, total, thought):
        sums += (0, 1) if usd is None else (money.pico(usd), 0)
        exponents.append(0 if not usd else int(usd.as_tuple().exponent))
    for ms in part_times(times):
        sums += (0, 0) if ms is None else (round(ms * 1000), 1)
    return sums + exponents


def add_sums(a: Sums, b: Sums) -> list[int]:
    """``a + b``."""
    return [*map(add, a[:_AT_EXPONENTS], b[:_AT_EXPONENTS]), *map(min, a[_AT_EXPONENTS:], b[_AT_EXPONENTS:])]


def totals_from(sums: Sums) -> Totals:
    """Sums as :class:`Totals`."""
    costs = {
        name: CostSum(
            known=money.written(sums[_AT_COSTS + 2 * at], sums[_AT_EXPONENTS + at]),
            unknown=sums[_AT_COSTS + 2 * at + 1],
        )
        for at, name in enumerate(_COSTS)
    }
    parts = {part: sums[_AT_PARTS + 2 * at] for at, part in enumerate(PARTS) if sums[_AT_PARTS + 2 * at + 1]}
    counts: dict[str, Any] = dict(zip(_ORDER, sums, strict=False))
    return Totals(**counts, cost_usd=CostSums(**costs), latency_us=parts)


class RunningTotal:
    """A sum that grows while a ``with ledger.scope()`` block runs. Safe to read from any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        hold_while_forking(self, "_lock")
        self._sums: Sums = NO_SUMS
        self._new: deque[Sums] = deque()  # the garbage collector may add the record of a lost stream inside our block

    def add(self, record: GenerationRecord) -> None:
        """Count one more record."""
        self._new.append(sums_of(record))
        if len(self._new) > _UNREAD:
            self._fold()

    @property
    def now(self) -> Totals:
        """The total at this moment."""
        return totals_from(self._fold())

    def _fold(self) -> Sums:
        with self._lock:
            while self._new:
                one = self._new.popleft()
                self._sums = add_sums(self._sums, one)
            return self._sums


_UNREAD = 64
