"""Blocking generators under asyncio: every item is computed in a thread, and leaving early stops the work."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from typing import Any, Generic, TypeVar

from ..scheduling.admission import Place

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


class in_threads(AsyncIterator[T], Generic[T]):
    """The items, each computed in a thread and in the caller's context.

    A ``Place`` among them is not passed on: the event loop waits for its turn, and no thread does. Nor is a None: it
    marks a point at which the caller can leave.

    Whoever leaves early (``aclose``, a cancelled task) gets control back when the item under way is computed and the
    generator is closed, however often it is cancelled meanwhile: nothing runs on behind, holds are released and the
    books are written. Who only lets go of it, as by ``break``, has it closed at once, without the event loop, which
    may be at its end: that is why this is no asynchronous generator. An item under way is computed first, behind.

    Args:
        items: computes them; closed at the end, however it comes.
        told: awaited with every item before it is passed on.
    """

    def __init__(
        self, items: Generator[Place | T | None, None, None], told: Callable[[T], Awaitable[None]] | None = None
    ) -> None:
        self._items, self._told = items, told
        self._context = copy_context()
        self._step: Future[Any] | None = None
        self._over = False

    async def __anext__(self) -> T:
        if self._over:
            raise StopAsyncIteration
        try:
            return await self._next()
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Close the generator once its last step is over; then be cancelled, if that was asked for meanwhile."""
        if self._over:
            return
        self._over = True
        cancelled = await _outlast(self._step) if self._step else None
        closed = _start(self._items.close)
        cancelled = await _outlast(closed) or cancelled
        closed.result()
        if cancelled:
            raise cancelled

    def __del__(self) -> None:
        if getattr(self, "_over", True):
            return
        self._over, items, context = True, self._items, self._context
        if self._step is None or self._step.done():
            context.run(items.close)
        else:  # its task was thrown away in the middle of a step
            self._step.add_done_callback(lambda _: context.run(items.close))

    async def _next(self) -> T:
        while True:
            self._step = _start(next, self._items, _END)
            await asyncio.wait([_end_of(self._step)])  # a thread cannot be cancelled, only waited for
            item = self._step.result()
            if item is _END:
                raise StopAsyncIteration
            if isinstance(item, Place):
                await asyncio.wait([_end_of(item.turn)], timeout=item.left_s)
            elif item is not None:
                if self._told:
                    await self._told(item)
                return item  # type: ignore[no-any-return]


def _start(work: Callable[..., Any], *args: Any) -> Future[Any]:
    return _threads.submit(copy_context().run, work, *args)


def _end_of(work: Future[Any]) -> asyncio.Future[None]:
    """Done when the work is over, also when it failed; nobody hears of it where the loop is closed by then."""
    loop = asyncio.get_running_loop()
    end: asyncio.Future[None] = loop.create_future()

    def tell(_: Future[Any]) -> None:
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(_set, end)

    work.add_done_callback(tell)
    return end


def _set(end: asyncio.Future[None]) -> None:
    if not end.done():
        end.set_result(None)


async def _outlast(work: Future[Any]) -> asyncio.CancelledError | None:
    """Wait until the work is over, whatever comes; gives the cancellation that came."""
    cancelled = None
    while not work.done():
        try:
            await asyncio.wait([_end_of(work)])
        except asyncio.CancelledError as asked:
            cancelled = asked
    work.exception()  # seen: the caller is leaving anyway
    return cancelled
