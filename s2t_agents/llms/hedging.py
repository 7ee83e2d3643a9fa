"""Hedging: a request that is late gets a twin, and the first usable answer of the two counts.

first  ──sent──── after_s ────────────> cancelled, once the other answers
                     └─> second ──> answer
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from ..errors import EndpointBusy, EscalationFailed

T = TypeVar("T")


async def hedged(request: Callable[[Callable[[], None]], Coroutine[Any, Any, T]], after_s: float) -> T:
    """The first usable answer of a request and, where it is late, of a second one like it.

    The clock runs from where the first has left: a connection that cannot be made is not tried twice, and a queue on
    this side grows no longer. A first request that fails before its time is up has failed; nothing is put again here.
    Both have ended when this returns or raises, the one that lost by being cancelled.

    Args:
        request: begins one; calls what it is given when its body begins to leave.
        after_s: seconds without an answer until the second is sent.

    Raises:
        EscalationFailed: no usable answer; one that may have cost something outranks one that did not.
    """
    sent = asyncio.Event()
    tasks = [asyncio.create_task(request(sent.set))]
    try:
        if await _late(tasks[0], sent, after_s):
            tasks.append(asyncio.create_task(request(_nothing)))
        return await _first_usable(tasks)
    finally:  # also when the caller is cancelled, or out of time
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _late(task: asyncio.Task[T], sent: asyncio.Event, after_s: float) -> bool:
    """Whether the request has neither answered nor failed so long after it was sent."""
    leaving = asyncio.create_task(sent.wait())
    try:
        await asyncio.wait([task, leaving], return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
    done, _ = await asyncio.wait([task], timeout=after_s)
    return not done


async def _first_usable(tasks: Sequence[asyncio.Task[T]]) -> T:
    failures: list[EscalationFailed] = []
    waiting = set(tasks)
    while waiting:
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            try:
                return task.result()
            except EscalationFailed as error:
                failures.append(error)
    raise max(failures, key=_weight)


def _weight(error: EscalationFailed) -> tuple[bool, float]:
    """Only where all were declined may the question be put again, and then after the longest wait."""
    return not isinstance(error, EndpointBusy), (error.wait_s or 0.0) if isinstance(error, EndpointBusy) else 0.0


def _nothing() -> None:
    """The second request has no twin that waits for it."""
