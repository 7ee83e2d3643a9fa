"""What every budget store does. Each operation is one atomic step over a whole chain of meters.

A *meter* is one budget's counters, named by its path (``fleet/run/agent``). A *chain* is the meters from the
root down to the one that reserves. A store promises, at every moment and for every unit::

    spent - overrun + held <= limit         and all four >= 0

that is, what was settled within its reservations and what is held never pass a limit. A call that costs more
than it reserved is booked in full all the same, and the part above as overrun: it counts against the
limit, so the next reservation is refused where nothing is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from s2t_agents.budget.amount import Units
from s2t_agents.budget.window import Window

Limits = tuple[int | None, int | None, int | None]
"""(pico-dollars, escalations, LLM tokens); ``None`` is no limit."""


class Link(NamedTuple):
    """One meter of a chain, and whether its finalization reserve may be used."""

    path: str
    final: bool


Chain = tuple[Link, ...]
"""Root first."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a meter was opened with; equal for everybody who opens it."""

    limits: Limits = (None, None, None)
    keep: tuple[int, int, int] = (0, 0, 0)
    micros: int | None = None
    window: Window | None = None


class Refusal(NamedTuple):
    """Why a reservation did not fit: one unit of one meter, in stored numbers (microseconds for time)."""

    path: str
    unit: str
    limit: int
    spent: int
    held: int
    wanted: int
    kept: int


class Closing(Enum):
    """What became of a hold that was settled or released."""

    DONE = "done"
    LATE = "late"  # it had expired; a settled cost was booked as overrun
    GONE = "gone"  # it had been closed before, or never was


class Reading(NamedTuple):
    """A meter at one moment. ``spent`` includes ``over``; ``micros_left`` is the time to the deadline."""

    limits: Limits
    keep: tuple[int, int, int]
    spent: Units
    held: Units
    over: Units
    micros: int | None
    micros_left: int | None
    holds: int


class BudgetStore(Protocol):
    """Where meters live. Implementations are safe for threads, and raise ``StoreUnavailable`` when unsure."""

    shared: bool
    """Whether another process can open the same meters (then a budget pickles)."""

    def open(self, path: str, terms: Terms) -> Terms:
        """Make the meter unless it is there, and return the terms it has. Its deadline starts when it is made."""

    def known(self, path: str) -> Terms | None:
        """The terms of a meter, or None where there is none."""

    def reserve(self, chain: Chain, hold: str, want: Units, ttl_us: int) -> Refusal | None:
        """Hold ``want`` on every meter of the chain, or on none and say why.

        ``hold`` is a new id that starts with the root's name and a slash, so that a store can tell trees apart.
        """

    def settle(self, hold: str, actual: Units) -> Closing:
        """Replace a hold by what was really used, on every meter of the chain it was made on."""

    def release(self, hold: str) -> Closing:
        """Give a hold back unused."""

    def extend(self, path: str, more: tuple[int, int, int], micros: int, once: str = "") -> bool:
        """Raise the limits of a meter; more time counts from now if the deadline has passed.

        Of several calls that name the same grant in ``once``, the first alone counts: False says that this was not it.
        """

    def read(self, path: str) -> Reading:
        """A meter as it is now, lapsed holds given back."""

    def close(self) -> None:
        """Let go of files and connections. Nothing is lost."""
