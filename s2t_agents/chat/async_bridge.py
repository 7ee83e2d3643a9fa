"""Blocking generators under asyncio: each item is computed in a worker thread, and cancellation stops the work."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from typing import Any, Generic, TypeVar

from ..backends.cpu_threads import release_threads
from ..scheduling.admission import AdmissionTicket

T = TypeVar("T")

THREADS = 256
"""Worker threads, that is generations that compute at once in this process; ``Concurrency`` limits the running ones."""

TURN_S = 0.05
"""Seconds that a thread goes on past items that are not passed on: to hand each over takes as long as a small step."""

_END: Any = object()


def _new_executor() -> None:
    global _executor
    _executor = ThreadPoolExecutor(THREADS, thread_name_prefix="s2t")


_executor: ThreadPoolExecutor
"""Not the event loop's default executor: six threads on two cores are too few to batch steps. Started on demand."""

_new_executor()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_executor)  # a child inherits the executor, but none of its threads


class ThreadedIterator(AsyncIterator[T], Generic[T]):
    """Async iterator over a blocking generator; each item is computed in a thread, in the caller's context.

    Two kinds of item are not passed on: for an ``AdmissionTicket`` the event loop waits until it is admitted, without
    blocking a thread; None marks a point at which the caller can be cancelled, or the event loop may have ended.

    ``aclose`` and a cancelled task return once the current item is computed and the generator is closed, even if they
    are cancelled again meanwhile: nothing keeps running, holds are released and the ledger record is written. If the
    iterator is only dropped, as by ``break``, the generator is closed without the event loop, which may have ended
    (an async generator could not do that), after the current item if one is being computed.

    Args:
        items: the generator; closed at the end in every case.
        on_item: awaited with every item before it is passed on.
    """

    def __init__(
        self,
        items: Generator[AdmissionTicket | T | None, None, None],
        on_item: Callable[[T], Awaitable[None]] | None = None,
    ) -> None:
        release_threads()  # the event loop's own OpenMP threads: they would slow down those of the forwards
        self._items, self._on_item = items, on_item
        self._context = copy_context()
        self._step: Future[Any] | None = None
        self._over = threading.Event()

    async def __anext__(self) -> T:
        if self._over.is_set():
            raise StopAsyncIteration
        try:
            return await self._next()
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Close the generator once the current item is computed; re-raises a cancellation that came meanwhile."""
        if self._over.is_set():
            return
        self._over.set()
        cancelled = await _wait_uncancelled(self._step) if self._step else None
        closed = _start(self._items.close)
        cancelled = await _wait_uncancelled(closed) or cancelled
        closed.result()
        if cancelled:
            raise cancelled

    def __del__(self) -> None:
        over, items, context = self._over, self._items, self._context
        if over.is_set():
            return
        over.set()
        if self._step is None or self._step.done():
            context.run(items.close)
        else:  # its task was destroyed in the middle of a step
            self._step.add_done_callback(lambda _: context.run(items.close))

    async def _next(self) -> T:
        while True:
            self._step = _start(_next_item, self._items, self._over)
            await asyncio.wait([_completion_future(self._step)])  # a thread cannot be cancelled
            item = self._step.result()
            if item is _END:
                raise StopAsyncIteration
            if isinstance(item, AdmissionTicket):
                await asyncio.wait([_completion_future(item.admitted)], timeout=item.left_s)
            elif item is not None:
                if self._on_item:
                    await self._on_item(item)
                return item  # type: ignore[no-any-return]


def _next_item(items: Generator[Any, None, None], over: threading.Event) -> Any:
    """The next item, in a thread; None where the caller has left, or after a while without one to pass on."""
    until = time.monotonic() + TURN_S
    while True:
        item = next(items, _END)
        if item is not None or over.is_set() or time.monotonic() > until:
            return item


def _start(work: Callable[..., Any], *args: Any) -> Future[Any]:
    return _executor.submit(copy_context().run, work, *args)


def _completion_future(work: Future[Any]) -> asyncio.Future[None]:
    """An asyncio future that is done when the work is, even if it failed; never done if the loop is closed first."""
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


async def _wait_uncancelled(work: Future[Any]) -> asyncio.CancelledError | None:
    """Wait until the work is done, through cancellations; returns the last one."""
    cancelled = None
    while not work.done():
        try:
            await asyncio.wait([_completion_future(work)])
        except asyncio.CancelledError as asked:
            cancelled = asked
    work.exception()  # retrieved, so that it is not reported as never retrieved
    return cancelled
