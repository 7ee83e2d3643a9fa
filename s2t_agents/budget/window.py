"""Budgets that start afresh after a fixed length of UTC time: per hour, per day, per week."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import BadLimit

MAX_LENGTH_S = 10**9
MAX_OFFSET_S = 5 * 10**9
"""In microseconds still exact in the doubles that Redis' scripts count in, also as a distance from now."""


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of UTC time after which what was spent is forgotten; what is held stays held.

    A clock set back never reopens a window that has passed, and one set forward by mistake keeps the
    spending of that later window until its time has really come: no jump makes money twice.

    Args:
        seconds: length of a window.
        offset_s: where windows start, in seconds after 1970-01-01 00:00 UTC (a Thursday). A day that
            starts at midnight in Berlin's winter is ``Window(86_400, offset_s=-3_600)``.

    Raises:
        BadLimit: a length under one second or not whole, or a start further than 5,000,000,000 seconds (158 years) away
            from 1970.
    """

    seconds: int
    offset_s: int = 0

    def __post_init__(self) -> None:
        if type(self.seconds) is not int or not 1 <= self.seconds <= MAX_LENGTH_S or type(self.offset_s) is not int:
            raise BadLimit(
                f"Window({self.seconds!r}, offset_s={self.offset_s!r}) must be whole seconds, 1 to {MAX_LENGTH_S:,}.",
                hint="Use PER_HOUR, PER_DAY or PER_WEEK.",
            )
        if abs(self.offset_s) > MAX_OFFSET_S:
            raise BadLimit(
                f"offset_s={self.offset_s!r} is not from -{MAX_OFFSET_S:,} to {MAX_OFFSET_S:,}.",
                hint="Give the seconds into a window, or since 1970, at which one starts.",
            )

    def index(self, wall_s: float) -> int:
        """Which window a moment (seconds since 1970 UTC) falls in."""
        return int((wall_s - self.offset_s) // self.seconds)


PER_HOUR = Window(3_600)
PER_DAY = Window(86_400)
PER_WEEK = Window(604_800, offset_s=4 * 86_400)  # weeks start on Monday
