"""What a generation waits for: it is a generator that yields each wait, and somebody else brings it about.

    a lone consumer      finish: every wait blocks the consumer's own thread, where the scheduler batches it
                         with those of other threads
    many at once         engine.together: one thread collects the waits of all and runs their forwards in one go

So there is one loop of steps, whoever drives it: nothing in it knows of threads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from typing import Any, TypeVar

from .requests import ForwardRequest
from .scheduler import Scheduler

T = TypeVar("T")


class Wait(ABC):
    """Something that has to happen before a generation can go on."""

    @property
    @abstractmethod
    def over(self) -> bool:
        """Whether it has happened."""

    @abstractmethod
    def block(self) -> None:
        """Return when it has happened; the thread may do the work itself."""


class Forwards(Wait):
    """Requests of one generation to one scheduler; each of them knows its output or its error in the end.

    Args:
        scheduler: of the model.
        requests: at least one.
    """

    def __init__(self, scheduler: Scheduler, requests: Sequence[ForwardRequest]) -> None:
        self.scheduler, self.requests = scheduler, requests

    @property
    def over(self) -> bool:
        """All of them are done, or failed."""
        return all(request.done for request in self.requests)

    def block(self) -> None:
        """Run them."""
        self.scheduler.run(self.requests)


Waiting = Generator[Wait, None, T]
"""A computation with waits in it; ``yield from`` it, or ``finish`` it."""


def finish(waiting: Waiting[T]) -> T:
    """The result of a computation, all its waits in this thread."""
    try:
        wait = next(waiting)
        while True:
            wait = after(wait, waiting)
    except StopIteration as end:
        result: T = end.value
        return result


def after(wait: Wait, waiting: Generator[Any, None, Any]) -> Any:
    """What comes after a wait; an error in it, as of an interrupt, is the generator's, which may have to clean up."""
    try:
        wait.block()
    except BaseException as error:  # noqa: BLE001 - raised in the generator
        return waiting.throw(error)
    return next(waiting)
