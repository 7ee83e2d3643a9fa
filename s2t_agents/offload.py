"""Blocking generators under asyncio: every item is computed in a thread, and leaving early stops the work."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, TypeVar

from .engine.admission import Place

T = TypeVar("T")

THREADS = 256
"""Steps that can be computed at once in this process under asyncio; how many generations run is ``Concurrency``'s."""

_END: Any = object()


def _new_threads() -> None:
    global _threads
    _threads = ThreadPoolExecutor(THREADS, thread_name_prefix="s2t")


_threads: ThreadPoolExecutor
"""Of its own: the event loop's has six threads on two cores, too few for steps to meet. They start when needed."""

_new_threads()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_threads)  # a child inherits the executor, but none of its threads


async def in_threads(items: Generator[Place | T, None, None]) -> AsyncGenerator[T, None]:
    """The items, each computed in a thread and in the caller's context.

    A ``Place`` among them is not passed on: the event loop waits for its turn, and no thread does.

    Whoever leaves early (``aclose``, a cancelled task) gets control back when the item under way is computed and the
    generator is closed, however often it is cancelled meanwhile: nothing runs on behind, holds are released and the
    books are written.
    """
    step: asyncio.Future[Any] | None = None
    try:
        while True:
            step = _start(next, items, _END)
            await asyncio.wait([step])  # a thread cannot be cancelled, only waited for
            item = step.result()
            if item is _END:
                return
            if isinstance(item, Place):
                await asyncio.wait([asyncio.wrap_future(item.turn)], timeout=item.left_s)
            else:
                yield item
    finally:
        await _close(items, step)


def _start(work: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
    return asyncio.get_running_loop().run_in_executor(_threads, copy_context().run, work, *args)


async def _close(items: Generator[Any, None, None], step: asyncio.Future[Any] | None) -> None:
    """Close the generator once its last step is over; then be cancelled, if that was asked for meanwhile."""
    cancelled = await _outlast(step) if step else None
    closed = _start(items.close)
    cancelled = await _outlast(closed) or cancelled
    closed.result()
    if cancelled:
        raise cancelled


async def _outlast(work: asyncio.Future[Any]) -> asyncio.CancelledError | None:
    """Wait until the work is over, whatever comes; gives the cancellation that came."""
    cancelled = None
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError as asked:
            cancelled = asked
    work.exception()  # seen: the caller is leaving anyway
    return cancelled
