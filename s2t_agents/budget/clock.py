"""The time of a budget store: a monotonic clock, and the time of day in UTC."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """The clocks that a store reads.

    Holds and deadlines run on :meth:`monotonic`, so setting the system clock changes neither; only
    :class:`~s2t_agents.budget.Window` reads :meth:`wall`.
    """

    def monotonic(self) -> float:
        """Seconds from an arbitrary start, never backwards, the same for every process since boot."""

    def wall(self) -> float:
        """Seconds since 1970-01-01 UTC."""


class SystemClock:
    """The machine's own clocks."""

    def monotonic(self) -> float:
        """Seconds since an arbitrary start."""
        return time.monotonic()

    def wall(self) -> float:
        """Seconds since 1970-01-01 UTC."""
        return time.time()
