"""One pass over records: sums and latencies by group; the records themselves are not kept.

A group takes about half a kilobyte, a measured part of a record's latency 12 bytes.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import LedgerError
from .latency import SHARES, Quantiles, percentile_rank
from .record import GenerationRecord
from .totals import NO_SUMS, PARTS, Sums, Totals, add_sums, part_times, sums_of, totals_from

By = Literal["agent", "thread", "run", "day"]

NO_KEY = "(none)"
"""Of answers without a thread, or a run; one of that name is told in quotes."""

GROUPS_BYTES = 128 * 2**20
"""Bytes for groups that are kept apart: a quarter of a million of them, if their names are short."""

GROUP_BYTES = 480
"""Bytes that a group takes, its name aside."""

_KEYS: dict[str, Callable[[GenerationRecord], str]] = {
    "agent": lambda record: record.agent,
    "thread": lambda record: _key(record.thread_id),
    "run": lambda record: _key(record.run_id),
    "day": lambda record: record.started_at.date().isoformat(),
}


class GroupedTotals:
    """Sums of records and percentiles of their latency, by group, in order of first appearance.

    Args:
        records: read once.
        by: ``"agent"``, ``"thread"``, ``"run"`` or ``"day"`` (UTC).

    Raises:
        LedgerError: no such grouping, or more groups than memory is set aside for; and what reading raises.
    """

    def __init__(self, records: Iterable[GenerationRecord], by: By) -> None:
        if by not in _KEYS:
            raise LedgerError(f"by={by!r}: no such grouping.", hint=f"Use one of {', '.join(_KEYS)}.")
        self._by, self._room = by, GROUPS_BYTES
        self._numbers: dict[str, int] = {}
        self._sums: list[Sums] = []
        self._times = {part: (array("I"), array("d")) for part in PARTS}
        key_of = _KEYS[by]
        for record in records:
            self._add(key_of(record), record)
        self._latency = {part: _percentiles(*times, len(self._sums)) for part, times in self._times.items()}
        self._times.clear()

    def __len__(self) -> int:
        return len(self._sums)

    def __iter__(self) -> Iterator[tuple[str, Totals, dict[str, Quantiles]]]:
        """Of every group: its name, its sums, and percentiles of every part that was measured at least once.

        Answers from the cache have no part in the latter.
        """
        for key, number in self._numbers.items():
            yield key, totals_from(self._sums[number]), self._latency_of(number)

    def total(self, skip: int = 0) -> Totals:
        """The sum of all groups but so many of the first."""
        return totals_from(reduce(add_sums, self._sums[skip:], NO_SUMS))

    def _add(self, key: str, record: GenerationRecord) -> None:
        number = self._numbers.get(key)
        if number is None:
            number = self._new(key)
        self._sums[number] = _packed(add_sums(self._sums[number], sums_of(record)))
        if record.cached:
            return
        for ms, (groups, values) in zip(part_times(record.latency_ms), self._times.values(), strict=True):
            if ms is not None:
                groups.append(number)
                values.append(ms)

    def _new(self, key: str) -> int:
        self._room -= GROUP_BYTES + len(key.encode())
        if self._room < 0:
            others = " or ".join(each for each in ("agent", "day") if each != self._by)
            raise LedgerError(
                f"by={self._by!r} makes more than {len(self._sums):,} groups, which is what is kept apart at most.",
                hint=f"Group by {others}, or split the file.",
            )
        self._numbers[key] = number = len(self._sums)
        self._sums.append(NO_SUMS)
        return number

    def _latency_of(self, number: int) -> dict[str, Quantiles]:
        found = {}
        for part, (counts, *values) in self._latency.items():
            if count := int(counts[number]):
                p50, p95, p99 = (float(each[number]) for each in values)
                found[part] = Quantiles(count=count, p50=p50, p95=p95, p99=p99)
        return found


def _key(name: str | None) -> str:
    if name is None:
        return NO_KEY
    return f'"{name}"' if name.strip('"') == NO_KEY else name


def _packed(sums: list[int]) -> Sums:
    try:
        return array("q", sums)
    except OverflowError:
        return sums


def _percentiles(groups: array[int], values: array[float], many: int) -> list[NDArray[Any]]:
    """For every group, ``[many]`` each: how many values it has, and those at the percentiles (0 where it has none)."""
    of, ms = np.frombuffer(groups, np.uint32), np.frombuffer(values, np.float64)
    order = np.lexsort((ms, of))
    counts = np.bincount(of, minlength=many)
    starts = np.concatenate(([0], counts.cumsum()[:-1]))
    out: list[NDArray[Any]] = [counts]
    for share in SHARES:
        at = np.zeros(many)
        has = counts > 0
        ranks = np.array([percentile_rank(int(count), share) for count in counts[has]], dtype=np.int64)
        at[has] = ms[order[starts[has] + ranks]]
        out.append(at)
    return out
