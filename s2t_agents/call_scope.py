"""Nested calls: the generations inside which code runs, in a context variable.

A call that a generation's callbacks make while it holds an engine slot must not wait for another slot.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from contextlib import closing, contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_END: Any = object()


class CallScope:
    """A generation, as seen by calls made inside it.

    Attributes:
        ticket: the ``AdmissionTicket`` with which it holds a slot of the engine; None while it holds none.
    """

    def __init__(self) -> None:
        self.ticket: object = None


_callers: ContextVar[tuple[CallScope, ...]] = ContextVar("s2t_callers", default=())


def callers() -> tuple[CallScope, ...]:
    """The generations inside which this is called, outermost first."""
    return _callers.get()


@contextmanager
def in_scope(*scopes: CallScope) -> Iterator[None]:
    """Calls in this block are inside these generations too."""
    token = _callers.set((*_callers.get(), *scopes))
    try:
        yield
    finally:
        _callers.reset(token)


def with_current_scopes(work: Callable[[], T]) -> Callable[[], T]:
    """``work`` with the current scopes, for a thread that does not copy the context."""
    scopes = callers()

    def run() -> T:
        with in_scope(*scopes):
            return work()

    return run


def scoped_items(caller: CallScope, items: Generator[T, None, None]) -> Generator[T, None, None]:
    """The items of a generator, each computed inside the scope; the consumer's code runs outside of it."""
    with closing(items):
        while True:
            with in_scope(caller):
                item = next(items, _END)
            if item is _END:
                return
            yield item


class ScopedAsyncIterator(AsyncIterator[T], Generic[T]):
    """``scoped_items`` for an async generator."""

    def __init__(self, caller: CallScope, items: AsyncGenerator[T, None]) -> None:
        self._caller, self._items = caller, items

    async def __anext__(self) -> T:
        with in_scope(self._caller):
            return await anext(self._items)

    async def aclose(self) -> None:
        """Close the generator."""
        await self._items.aclose()
