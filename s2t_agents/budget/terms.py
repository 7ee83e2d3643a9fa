"""From the limits of :class:`~s2t_agents.budget.Budget` to the terms that a store keeps."""

from __future__ import annotations

import math
from typing import Literal, TypedDict

from ..errors import BadLimit
from ..types import Charge
from . import money
from .quantities import MAX_SECONDS, NOTHING, UNITS, Counts, Limits, Quantities, quantities_of
from .store import Terms
from .window import Window

OnExhausted = Literal["degrade", "raise", "ask"]


class LimitsGiven(TypedDict, total=False):
    """The keyword limits of :class:`~s2t_agents.budget.Budget`; left out or None is no limit."""

    usd: money.Dollars | None
    escalations: int | None
    llm_tokens: int | None
    answers: int | None
    answer_tokens: int | None
    seconds: float | None
    reserve_for_final: Charge | None
    window: Window | None


def terms_of(given: LimitsGiven) -> Terms:
    """Check limits and put them in whole units.

    Raises:
        BadLimit: naming the value, what is wrong with it and the way out.
    """
    unknown = set(given) - set(LimitsGiven.__annotations__)
    if unknown:
        raise BadLimit(
            f"{', '.join(sorted(unknown))}: no such limit.",
            hint=f"Limits are {', '.join(UNITS[:-1])} and seconds.",
        )
    usd, seconds, window = given.get("usd"), given.get("seconds"), given.get("window")
    limits: Limits = Quantities(
        usd=None if usd is None else money.limit_pico(usd, "usd"),
        escalations=_count(given.get("escalations"), "escalations"),
        llm_tokens=_count(given.get("llm_tokens"), "llm_tokens"),
        answers=_count(given.get("answers"), "answers"),
        answer_tokens=_count(given.get("answer_tokens"), "answer_tokens"),
        seconds=None if seconds is None else micros_of(seconds, "seconds"),
        unpriced=None,
    )
    if window is not None and not isinstance(window, Window):
        raise BadLimit(f"window={window!r} is not a Window.", hint="Use PER_HOUR, PER_DAY or PER_WEEK.")
    if window is not None and seconds is not None:
        raise BadLimit(
            f"seconds={seconds!r} is a deadline and cannot start afresh with a window.",
            hint="Put the deadline on a child budget.",
        )
    return Terms(limits, _kept(given.get("reserve_for_final"), limits), window)


def _count(limit: int | None, what: str) -> int | None:
    return None if limit is None else money.count(limit, what)


def micros_of(seconds: float, what: str) -> int:
    """Whole microseconds.

    Raises:
        BadLimit: not a number of seconds from 0 to ten years.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise BadLimit(f"{what}={seconds!r} is not a number of seconds.", hint="Give a number, such as 30.")
    if not math.isfinite(seconds) or not 0 <= seconds <= MAX_SECONDS:
        raise BadLimit(
            f"{what}={seconds!r} must be from 0 to {MAX_SECONDS:,} (ten years).",
            hint="Leave it out (None) for no limit.",
        )
    return round(seconds * 1e6)


def _kept(reserve: Charge | None, limits: Limits) -> Counts:
    if reserve is None:
        return NOTHING
    kept = quantities_of(reserve)
    for unit, limit, back in zip(UNITS, limits, kept, strict=False):
        if back and (limit is None or back > limit):
            raise BadLimit(
                f"reserve_for_final keeps back more {unit} than there is a limit for.",
                hint=f"Give {unit}= a limit of at least that much, or keep back less.",
            )
    return kept._replace(unpriced=0)
