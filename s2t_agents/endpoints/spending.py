"""What requests to a server may cost and have cost: held before each is sent, settled by its token counts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from ..budget import Budget, Charge, Hold, TokenPrice
from ..budget.charges import charge_for, most_for
from ..errors import HoldClosed, StoreUnavailable

T = TypeVar("T")

REQUEST_HOLD_S = 3600.0
"""Seconds after which a hold lapses should this process die: longer than any request."""


@dataclass(frozen=True)
class Spending:
    """The budget that a server's requests are paid from.

    Attributes:
        budget: takes every request.
        price: of the server's tokens; None where it is unknown.
    """

    budget: Budget
    price: TokenPrice | None = None

    def hold(self, input_tokens: int, output_tokens: int) -> Payment:
        """Hold the most that a request may cost.

        Raises:
            BudgetExceeded, UnpricedModel, StoreUnavailable: as ``Budget.reserve``; the request must not be sent.
        """
        most = most_for(self.price, input_tokens=input_tokens, output_tokens=output_tokens, escalations=0)
        return Payment(self, self.budget.reserve(most, ttl_s=REQUEST_HOLD_S))

    async def holding(self, input_tokens: int, output_tokens: int) -> Payment:
        """``hold`` in a thread, so that no store stops an event loop; a cancelled caller holds nothing."""
        held, cancelled = await _in_thread(self.hold, input_tokens, output_tokens)
        if cancelled is not None:
            await _in_thread(held.release)
            raise cancelled
        return held

    def charge(self, **counts: int) -> Charge:
        """Of a request that is no question to an LLM; ``counts`` as of ``charge_for``."""
        return charge_for(self.price, **counts, escalations=0)


@dataclass(frozen=True)
class Payment:
    """What is held for one request; it is settled or released once."""

    spending: Spending
    held: Hold

    def settle(self, **counts: int) -> None:
        """Book what the request cost; ``counts`` as of ``charge_for``."""
        with contextlib.suppress(HoldClosed, StoreUnavailable):  # booked as overrun, or before the next reservation
            self.held.settle(self.spending.charge(**counts))

    def release(self) -> None:
        """It cost nothing: it was not sent, or the server declined."""
        with contextlib.suppress(HoldClosed, StoreUnavailable):  # lapsed, or will
            self.held.release()

    async def closing(self, counts: dict[str, int] | None) -> None:
        """``settle`` with these counts, or without any ``release``, in a thread; a cancelled caller waits for it."""
        _, cancelled = await _in_thread(self.release if counts is None else partial(self.settle, **counts))
        if cancelled is not None:
            raise cancelled


async def _in_thread(work: Callable[..., T], *arguments: Any) -> tuple[T, asyncio.CancelledError | None]:
    """The work's result, waited for through cancellations, and the last of these."""
    running = asyncio.get_running_loop().run_in_executor(None, partial(work, *arguments))
    cancelled = None
    while not running.done():
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError as asked:
            cancelled = asked
    return running.result(), cancelled
