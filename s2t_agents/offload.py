"""Blocking generators under asyncio: every item is computed in a thread, and leaving early stops the work."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Generator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, TypeVar

T = TypeVar("T")

THREADS = 256
"""Generations that can be under way in this process under asyncio; how many run is ``Concurrency``'s matter."""


def _new_threads() -> None:
    global _threads
    _threads = ThreadPoolExecutor(THREADS, thread_name_prefix="s2t")


_threads: ThreadPoolExecutor
"""Of its own: the event loop's has six threads on two cores, too few for steps to meet. They start when needed."""

_new_threads()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_threads)  # a child inherits the executor, but none of its threads


async def in_threads(items: Generator[T, None, None]) -> AsyncGenerator[T, None]:
    """The items, each computed in a thread and in the caller's context.

    Whoever leaves early (``aclose``, a cancelled task) gets control back when the item under way is computed and the
    generator is closed: nothing runs on behind, holds are released and the books are written.
    """
    loop = asyncio.get_running_loop()
    end: Any = object()
    step: asyncio.Future[T] | None = None
    over = False

    def following() -> T:
        return next(items, end)

    try:
        while True:
            step = loop.run_in_executor(_threads, copy_context().run, following)
            item = await asyncio.shield(step)  # a thread can not be cancelled, only waited for
            if item is end:
                over = True
                return
            yield item
    finally:
        if step is not None and not step.done():
            await asyncio.wait([step])
            step.exception()  # seen: the caller is leaving anyway
        if not over:
            await loop.run_in_executor(_threads, copy_context().run, items.close)
