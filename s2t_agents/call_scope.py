"""Nested calls: the generations on whose behalf code runs, in a context variable that tasks and threads copy."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from contextlib import closing, contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_END: Any = object()


class CallScope:
    """A generation, as what it calls meanwhile sees it.

    Attributes:
        place: the engine's place that it holds; None while it holds none.
    """

    def __init__(self) -> None:
        self.place: object = None


_callers: ContextVar[tuple[CallScope, ...]] = ContextVar("s2t_callers", default=())


def callers() -> tuple[CallScope, ...]:
    """The generations on whose behalf this is called, outermost first."""
    return _callers.get()


@contextmanager
def calling(*more: CallScope) -> Iterator[None]:
    """Calls in this block are made on behalf of these, too."""
    token = _callers.set((*_callers.get(), *more))
    try:
        yield
    finally:
        _callers.reset(token)


def carried(work: Callable[[], T]) -> Callable[[], T]:
    """``work`` for a thread that takes over nothing else of this context."""
    around = callers()

    def run() -> T:
        with calling(*around):
            return work()

    return run


def on_behalf(caller: CallScope, items: Generator[T, None, None]) -> Generator[T, None, None]:
    """The items of a generation: what computes them calls on its behalf, what consumes them does not."""
    with closing(items):
        while True:
            with calling(caller):
                item = next(items, _END)
            if item is _END:
                return
            yield item


class AsyncOnBehalf(AsyncIterator[T], Generic[T]):
    """As ``on_behalf``, of an asynchronous generator."""

    def __init__(self, caller: CallScope, items: AsyncGenerator[T, None]) -> None:
        self._caller, self._items = caller, items

    async def __anext__(self) -> T:
        with calling(self._caller):
            return await anext(self._items)

    async def aclose(self) -> None:
        """Close the generator."""
        await self._items.aclose()
