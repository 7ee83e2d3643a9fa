"""One reservation, until it is settled, released or lapses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import TracebackType
from typing import Self

from ..errors import BadLimit, HoldClosed, StoreUnavailable
from ..types import Charge
from .meter_handle import MeterHandle
from .quantities import Counts, quantities_of
from .store import Closing


class Hold:
    """What is reserved for one call. As a context manager it is released unless it was settled.

    ::

        with budget.reserve(Charge(Decimal("0.002"), llm_tokens=901)) as hold:
            pick = ask_the_llm()
            hold.settle(Charge(price.cost(input_tokens=900, output_tokens=1), llm_tokens=901))

    Attributes:
        id: of the hold, in its store.
        path: of the budget.
        reserved: the most that the call can cost.
        actual: what was handed to :meth:`settle`; None before.

    A charge that was handed to :meth:`settle` is never forgotten: if settling is interrupted, leaving the block
    finishes it; if the store is unavailable, it is settled before the next reservation through this budget.
    """

    __slots__ = ("_closed", "_meter", "_settled", "_want", "actual", "id", "path", "reserved")

    def __init__(
        self,
        meter: MeterHandle,
        hold_id: str,
        reserved: Charge,
        want: Counts,
        settled: Callable[[], None] | None = None,
    ) -> None:
        self._meter, self._want, self._settled = meter, want, settled
        self._closed = ""
        self.id, self.path, self.reserved = hold_id, meter.path, reserved
        self.actual: Charge | None = None

    def settle(self, actual: Charge) -> None:
        """Book what was really used and give the rest back.

        More than was reserved is booked in full, counted as overrun on the whole chain. A cost of unknown
        price (``usd=None``) is booked at the reserved price.

        Args:
            actual: the real cost.

        Raises:
            BadLimit: no charge that can be counted, alone or with all that is spent; the hold stays open.
            HoldClosed: settled or released before; or lapsed, and then the cost *was* booked, as overrun.
            StoreUnavailable: not booked yet; it will be before the next reservation through this budget.
        """
        self._check_open("settle")
        again, self.actual = self.actual is not None, actual
        try:
            spent = quantities_of(actual)
            if spent.unpriced and not self._want.unpriced:
                spent = spent._replace(usd=self._want.usd, unpriced=0)
            closing = self._meter.store.settle(self.id, spent)
        except BadLimit:
            self.actual = None
            raise
        except StoreUnavailable:
            self._meter.unsettled.add(self.id, spent, self._want)
            self._closed = "settled"
            raise
        self._closed = "settled"
        if self._settled is not None:
            self._settled()
        if closing is Closing.LATE:
            raise HoldClosed(
                f"The hold on budget {self.path!r} had lapsed before it was settled; its cost was booked as overrun.",
                hint="Give reserve() a longer ttl_s.",
            )
        if closing is Closing.GONE and not again:  # again: the interrupted first try had got through
            raise self._gone("settle")

    def release(self) -> None:
        """Give the whole reservation back: the call did not happen.

        Raises:
            HoldClosed: settled, released or lapsed before.
            StoreUnavailable: the hold lapses by itself after its ``ttl_s``.
        """
        self._check_open("release")
        self._closed = "released"
        if self._meter.store.release(self.id) is not Closing.DONE:
            self._closed = "lapsed"
            raise self._gone("release")

    def close(self, owed: Charge | None) -> None:
        """Settle what is owed, or release for None; where that fails, it is made up for as the class says."""
        # lapsed: booked as overrun; store down: settled later; interrupted: leaving the block finishes it
        with contextlib.suppress(HoldClosed, StoreUnavailable), self:
            if owed is None:
                self.release()
                return
            try:
                self.settle(owed)
            except BadLimit:  # with all that is spent it cannot be counted; what was held can
                self.settle(self.reserved)

    @property
    def open(self) -> bool:
        """Whether it was neither settled nor released through this object."""
        return not self._closed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._closed:
            return
        with contextlib.suppress(HoldClosed, StoreUnavailable):  # lapsed, or will; a charge is booked or unsettled
            if self.actual is not None:  # interrupted in the middle of settle: the money is gone, so book it
                self.settle(self.actual)
            else:
                self.release()

    def __repr__(self) -> str:
        return f"<Hold {self.reserved} on {self.path!r}: {self._closed or 'open'}>"

    def _check_open(self, verb: str) -> None:
        if self._closed:
            raise self._gone(verb)

    def _gone(self, verb: str) -> HoldClosed:
        return HoldClosed(
            f"Can not {verb} the hold on budget {self.path!r}: it was {self._closed or 'closed'} before.",
            hint="Settle or release a hold once; used as a context manager it releases itself.",
        )
