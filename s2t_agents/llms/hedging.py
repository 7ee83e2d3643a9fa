"""Hedged requests: a slow request is sent a second time, and the first usable answer is taken.

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
    """The first usable answer of a request and, if it is slow, of a second identical one.

    The delay counts from when the first request was sent, so that a connection that cannot be made is not tried twice
    and local queueing does not cause hedging. A first request that fails within the delay is not repeated here. Both
    requests have ended when this returns or raises; the slower one is cancelled.

    Args:
        request: sends one request; calls its argument when the body begins to be sent.
        after_s: seconds without an answer until the second is sent.

    Raises:
        EscalationFailed: no usable answer; of two errors, the one that may have cost something.
    """
    sent = asyncio.Event()
    tasks = [asyncio.create_task(request(sent.set))]
    try:
        if await _is_late(tasks[0], sent, after_s):
            tasks.append(asyncio.create_task(request(_ignore)))
        return await _first_usable(tasks)
    finally:  # also when the caller is cancelled or times out
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _is_late(task: asyncio.Task[T], sent: asyncio.Event, after_s: float) -> bool:
    """Whether the request is still pending ``after_s`` seconds after it was sent."""
    sent_task = asyncio.create_task(sent.wait())
    try:
        await asyncio.wait([task, sent_task], return_when=asyncio.FIRST_COMPLETED)
    finally:
        sent_task.cancel()
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
    raise max(failures, key=_severity)


def _severity(error: EscalationFailed) -> tuple[bool, float]:
    """Sort key of errors: one that may have cost something counts most; of ``EndpointBusy`` ones, the longest wait."""
    return not isinstance(error, EndpointBusy), (error.wait_s or 0.0) if isinstance(error, EndpointBusy) else 0.0


def _ignore() -> None:
    """Callback of the second request, which is not hedged."""
