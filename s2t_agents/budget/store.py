"""What every budget store does. Each operation is one atomic step over a whole chain of meters.

A *meter* is one budget's counters, named by its path (``fleet/run/agent``). A *chain* is the meters from the
root down to the one that reserves. A store promises, at every moment and for every unit::

    spent - overrun + held <= limit         and all four >= 0

that is, what was settled within its reservations and what is held never pass a limit. A call that costs more
than it reserved is booked in full all the same, and the part above as overrun: it counts against the
limit, so the next reservation is refused where nothing is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, Protocol

from .quantities import COUNTED, NOTHING, UNLIMITED, Counts, Limits, Quantities
from .state import BudgetState
from .window import Window


class Link(NamedTuple):
    """One meter of a chain, and whether its finalization reserve may be used."""

    path: str
    final: bool


Chain = tuple[Link, ...]
"""Root first."""


@dataclass(frozen=True)
class Terms:
    """What a meter was opened with; opening it again must give equal ones.

    Attributes:
        limits: what may be spent; ``seconds`` is the time until its deadline.
        keep: the finalization reserve.
        window: None where spending never starts afresh.
    """

    limits: Limits = UNLIMITED
    keep: Counts = NOTHING
    window: Window | None = None

    @classmethod
    def of(
        cls,
        limits: Sequence[int | None],
        keep: Sequence[int],
        micros: int | None,
        window: Window | None,
    ) -> Terms:
        """From the form that stores and pickles keep: each ``COUNTED`` unit, the same, time.

        What was kept before answers and their tokens were counted has the first three units alone.
        """
        missing = len(COUNTED) - len(limits)
        return cls(
            Quantities._make((*limits, *(None,) * missing, micros, None)),
            Quantities._make((*keep, *(0,) * missing, 0, 0)),
            window,
        )

    def parts(self) -> tuple[tuple[int | None, ...], tuple[int, ...], int | None, Window | None]:
        """The arguments of :meth:`of`."""
        return (tuple(self.limits[:5]), tuple(self.keep[:5]), self.limits.seconds, self.window)

    def __getstate__(self) -> list[Any]:
        return list(self.parts())

    def __setstate__(self, parts: Sequence[Any]) -> None:
        """Pickles keep :meth:`parts`, whatever this class is made of."""
        self.__dict__.update(Terms.of(*parts).__dict__)


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
    LATE = "late"  # it had expired; a settled charge was booked as overrun
    GONE = "gone"  # it had been closed before, or never was


class BudgetStore(Protocol):
    """Where meters live. Implementations are safe for threads, and raise ``StoreUnavailable`` when unsure."""

    shared: bool
    """Whether another process can open the same meters (then a budget pickles)."""

    def open_meter(self, path: str, terms: Terms) -> Terms:
        """Make the meter unless it is there, and return the terms it has. Its deadline starts when it is made."""

    def find_terms(self, path: str) -> Terms | None:
        """The terms of a meter, or None where there is none."""

    def reserve(self, chain: Chain, hold_id: str, want: Counts, ttl_us: int) -> Refusal | None:
        """Hold ``want`` on every meter of the chain, or on none and say why.

        ``hold_id`` is new and starts with the root's name and a slash, so that a store can tell trees apart.
        """

    def settle(self, hold_id: str, actual: Counts) -> Closing:
        """Replace a hold by what was really used, on every meter of the chain it was made on."""

    def release(self, hold_id: str) -> Closing:
        """Give a hold back unused."""

    def extend(self, path: str, more: Counts, once: str = "") -> bool:
        """Raise the limits of a meter; more time counts from now if the deadline has passed.

        Of several calls that name the same grant in ``once``, only the first counts; False: it was not this one.
        """

    def read_state(self, path: str) -> BudgetState:
        """A meter as it is now, lapsed holds given back."""

    def close(self) -> None:
        """Close files and connections. Nothing is lost."""
