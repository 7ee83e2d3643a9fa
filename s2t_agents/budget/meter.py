"""The arithmetic of one meter, without storage or locks: the memory and SQLite stores share it."""

from __future__ import annotations

from typing import NamedTuple

from .quantities import (
    LARGEST_TOTAL,
    NOTHING,
    UNITS,
    Counts,
    Limits,
    check_total,
    excess,
    minus,
    plus,
    raised,
)
from .state import BudgetState, state_of
from .store import Refusal, Terms

LEAST_TOTAL = LARGEST_TOTAL.unpriced
"""No sum up to here needs a second look, whatever its unit."""

_new = tuple.__new__  # a reservation makes several meters, and this takes half the time of Meter(...)


class Meter(NamedTuple):
    """The counters of one budget; every operation gives a new one.

    Attributes:
        terms: what it was opened with.
        limits: as they are now, extensions included.
        deadline_us: microseconds of the store's clock; None without one.
        window: the index of the window that ``spent`` and ``over`` belong to.
        spent: settled, ``over`` included.
        held: reserved at this moment.
        over: the part of ``spent`` above what was reserved for it.
    """

    terms: Terms
    limits: Limits
    deadline_us: int | None
    window: int
    spent: Counts
    held: Counts
    over: Counts

    @classmethod
    def fresh(cls, terms: Terms, now_us: int, wall_s: float) -> Meter:
        """A meter with nothing spent; its deadline runs from now."""
        deadline = None if terms.limits.seconds is None else now_us + terms.limits.seconds
        window = terms.window.index(wall_s) if terms.window else 0
        return cls(terms, terms.limits, deadline, window, NOTHING, NOTHING, NOTHING)

    def in_window_at(self, wall_s: float) -> Meter:
        """The meter in the window of this moment: a later one starts with nothing spent, an earlier never reopens."""
        if self.terms.window is None or (now := self.terms.window.index(wall_s)) <= self.window:
            return self
        return self._replace(window=now, spent=NOTHING, over=NOTHING)

    def refusal(self, path: str, want: Counts, final: bool, now_us: int) -> Refusal | None:
        """The first unit in which ``want`` does not fit, or None."""
        if self.deadline_us is not None and now_us >= self.deadline_us:
            given = self.limits.seconds or 0
            return Refusal(path, "seconds", given, given + now_us - self.deadline_us, 0, 0, 0)
        spent, held, keep = self.spent, self.held, self.terms.keep
        for i, limit in enumerate(self.limits):
            if limit is None or not want[i]:  # a unit that is not wanted never refuses, even when overrun
                continue
            kept = 0 if final else keep[i]
            if spent[i] + held[i] + want[i] + kept > limit:
                return Refusal(path, UNITS[i], limit, spent[i], held[i], want[i], kept)
        return None

    def reserve(self, want: Counts) -> Meter:
        """The meter with ``want`` held.

        Raises:
            BadLimit: as ``check_total``.
        """
        terms, limits, deadline, window, spent, held, over = self
        held = plus(held, want)
        if max(spent) + max(held) > LEAST_TOTAL:
            check_total(plus(spent, held))
        return _new(Meter, (terms, limits, deadline, window, spent, held, over))

    def release(self, reserved: Counts) -> Meter:
        """The meter with a hold of ``reserved`` gone, unused."""
        terms, limits, deadline, window, spent, held, over = self
        return _new(Meter, (terms, limits, deadline, window, spent, minus(held, reserved), over))

    def settle(self, reserved: Counts, actual: Counts) -> Meter:
        """The meter with a hold of ``reserved`` replaced by a charge of ``actual``.

        Raises:
            BadLimit: as ``check_total``.
        """
        terms, limits, deadline, window, spent, held, over = self
        if actual != reserved:
            over = plus(over, excess(actual, reserved))
        spent = plus(spent, actual)
        if max(spent) > LEAST_TOTAL:
            check_total(spent)
        return _new(Meter, (terms, limits, deadline, window, spent, minus(held, reserved), over))

    def overrun(self, actual: Counts) -> Meter:
        """The meter with a charge that nothing was held for."""
        return self.settle(NOTHING, actual)

    def extend(self, more: Counts, now_us: int) -> Meter:
        """The meter with higher limits; more time counts from now if the deadline has passed.

        Raises:
            BadLimit: as ``check_limits``.
        """
        if self.deadline_us is None or not more.seconds:
            return self._replace(limits=raised(self.limits, more))
        passed = max(0, now_us - self.deadline_us)
        limits = raised(self.limits, more._replace(seconds=more.seconds + passed))
        return self._replace(limits=limits, deadline_us=self.deadline_us + passed + more.seconds)

    def state(self, path: str, now_us: int, holds: int) -> BudgetState:
        """The meter in public units."""
        spent = self.spent
        if self.deadline_us is not None and self.limits.seconds is not None:
            spent = spent._replace(seconds=self.limits.seconds - max(0, self.deadline_us - now_us))
        return state_of(path, self.limits, self.terms.keep, spent, self.held, self.over, holds, self.window)
