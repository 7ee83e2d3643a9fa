"""The arithmetic of one meter, without storage or locks: the memory and SQLite stores share it."""

from __future__ import annotations

from typing import NamedTuple

from s2t_agents.budget.amount import NOTHING, UNITS, Units, excess, minus, plus
from s2t_agents.budget.store import Limits, Reading, Refusal, Terms


class Meter(NamedTuple):
    """Counters of one budget. Times are microseconds of the store's clock."""

    terms: Terms
    limits: Limits
    deadline_us: int | None
    micros: int | None
    window: int
    spent: Units
    held: Units
    over: Units


_new = tuple.__new__  # a reservation makes several meters, and this takes half the time of Meter(...)


def opened(terms: Terms, now_us: int, wall_s: float) -> Meter:
    """A fresh meter; its deadline runs from now."""
    deadline = None if terms.micros is None else now_us + terms.micros
    window = terms.window.index(wall_s) if terms.window else 0
    return Meter(terms, terms.limits, deadline, terms.micros, window, NOTHING, NOTHING, NOTHING)


def rolled(meter: Meter, wall_s: float) -> Meter:
    """The meter in the window of this moment: a later one starts with nothing spent, an earlier never reopens."""
    if meter.terms.window is None or (now := meter.terms.window.index(wall_s)) <= meter.window:
        return meter
    return meter._replace(window=now, spent=NOTHING, over=NOTHING)


def refusal(meter: Meter, path: str, want: Units, final: bool, now_us: int) -> Refusal | None:
    """The first unit in which ``want`` does not fit, or None."""
    if meter.deadline_us is not None and now_us >= meter.deadline_us:
        micros = meter.micros or 0
        return Refusal(path, "seconds", micros, micros + now_us - meter.deadline_us, 0, 0, 0)
    spent, held, keep = meter.spent, meter.held, meter.terms.keep
    for i, limit in enumerate(meter.limits):
        if limit is None or not want[i]:  # a unit it does not touch never stands in its way, even when overrun
            continue
        kept = 0 if final else keep[i]
        if spent[i] + held[i] + want[i] + kept > limit:
            return Refusal(path, UNITS[i], limit, spent[i], held[i], want[i], kept)
    return None


def holding(meter: Meter, want: Units) -> Meter:
    """The meter with ``want`` held."""
    terms, limits, deadline, micros, window, spent, held, over = meter
    return _new(Meter, (terms, limits, deadline, micros, window, spent, plus(held, want), over))


def given_back(meter: Meter, want: Units) -> Meter:
    """The meter with a hold of ``want`` gone, unused."""
    terms, limits, deadline, micros, window, spent, held, over = meter
    return _new(Meter, (terms, limits, deadline, micros, window, spent, minus(held, want), over))


def settled(meter: Meter, reserved: Units, actual: Units) -> Meter:
    """The meter with a hold of ``reserved`` replaced by a cost of ``actual``."""
    terms, limits, deadline, micros, window, spent, held, over = meter
    if actual != reserved:
        over = plus(over, excess(actual, reserved))
    return _new(Meter, (terms, limits, deadline, micros, window, plus(spent, actual), minus(held, reserved), over))


def booked(meter: Meter, actual: Units) -> Meter:
    """The meter with a cost that nothing was held for: all of it is overrun."""
    return settled(meter, NOTHING, actual)


def extended(meter: Meter, more: tuple[int, int, int], micros: int, now_us: int) -> Meter:
    """The meter with higher limits; more time counts from now if the deadline has passed."""
    usd, escalations, tokens = (None if old is None else old + new for old, new in zip(meter.limits, more, strict=True))
    deadline, total = meter.deadline_us, meter.micros
    if micros and deadline is not None and total is not None:
        total += micros + max(0, now_us - deadline)
        deadline = max(deadline, now_us) + micros
    return meter._replace(limits=(usd, escalations, tokens), deadline_us=deadline, micros=total)


def reading(meter: Meter, now_us: int, holds: int) -> Reading:
    """The meter as people ask about it."""
    left = None if meter.deadline_us is None else max(0, meter.deadline_us - now_us)
    return Reading(meter.limits, meter.terms.keep, meter.spent, meter.held, meter.over, meter.micros, left, holds)
