"""What a computation waits for, and its drivers: a computation is a generator that yields each wait.

    drive_blocking   one computation, each wait in the consumer's thread; the scheduler batches its forwards with those
                     of other threads
    finish           the same, for its result
    gather           many computations in one thread; the forwards of all run together

    computation a   ─ propose ─ wait ┐             ┌ select ─ wait ┐
    computation b   ─ propose ─ wait ┼─ scheduler ─┼ emit ─ propose┼─ scheduler ─ ...       (gather)
    computation c   ─ ask     ─ wait ┘ (of each)   └ propose       ┘

There is one loop of steps, whichever driver runs it: nothing in it depends on threads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from typing import Any, TypeVar

from ..backends.cpu_threads import single_threaded
from .computing import computing
from .requests import ForwardRequest
from .scheduler import Scheduler

T = TypeVar("T")


class Wait(ABC):
    """Something that has to happen before a computation can go on."""

    lasting = False
    """Whether it may take as long as other generations do. A blocking driver yields it to its consumer first, who may
    wait in another way (without a thread); ``gather`` blocks for any other first."""

    @property
    @abstractmethod
    def over(self) -> bool:
        """Whether it has happened."""

    @abstractmethod
    def block(self) -> None:
        """Return when it has happened; the thread may do the work itself."""


class Forwards(Wait):
    """Requests of one computation to one scheduler; each of them has its output or its error in the end.

    Args:
        scheduler: of the model.
        requests: at least one.
        caller: see ``Scheduler.run``.
    """

    def __init__(self, scheduler: Scheduler, requests: Sequence[ForwardRequest], caller: object = None) -> None:
        self.scheduler, self.requests, self._caller = scheduler, requests, caller

    @property
    def over(self) -> bool:
        """All of them are done, or failed."""
        return all(request.done for request in self.requests)

    def block(self) -> None:
        """Run them."""
        self.scheduler.run(self.requests, self._caller)


Waiting = Generator[Wait, None, T]
"""A computation with waits in it; ``yield from`` it, or give it to a driver."""


def drive_blocking(computation: Generator[Any, None, T]) -> Generator[Any, None, T]:
    """What a computation yields, its waits brought about in this thread; of the waits, only those that are ``lasting``.

    An error in a wait, as of an interrupt, is raised in the computation, which may have to clean up.
    """
    try:
        with computing:
            item = next(computation)
        while True:
            waits = isinstance(item, Wait)
            if not waits or item.lasting:
                yield item
            try:
                if waits:
                    item.block()
            except BaseException as error:  # noqa: BLE001 - the computation's own
                with computing:
                    item = computation.throw(error)
            else:
                with computing:
                    item = next(computation)
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        with computing:
            computation.close()


def finish(computation: Waiting[T]) -> T:
    """The result of a computation, all its waits in this thread."""
    driven = drive_blocking(computation)
    try:
        while True:
            next(driven)  # a wait that is lasting: the driver blocks for it when it is asked for more
    except StopIteration as end:
        result: T = end.value
        return result


def gather(computations: Sequence[Waiting[T]]) -> list[T]:
    """The results of all computations in their order, as of ``asyncio.gather``: whole answers to many prompts.

    What shares a forward depends on the computations alone, never on the timing of threads.

    Args:
        computations: each a generator of its waits, as the engine's ``steps_of``, or one that goes on from it. What its
            wait raises is raised in it.

    Raises:
        BaseException: what the first of them raised, or an interrupt of their forwards; the others are closed.
    """
    results: dict[int, T] = {}
    waits: dict[int, Wait] = {}

    def resume(at: int, error: BaseException | None = None) -> None:
        waits.pop(at, None)
        try:
            with computing:
                waits[at] = next(computations[at]) if error is None else computations[at].throw(error)
        except StopIteration as end:
            results[at] = end.value

    try:
        with single_threaded():
            for at in range(len(computations)):
                resume(at)
            while waits:
                failed = _bring_about(waits, computations)
                for at in [at for at in sorted(waits) if at in failed or waits[at].over]:
                    resume(at, failed.get(at))
    finally:
        with computing:
            for computation in computations:
                computation.close()
    return [results[at] for at in range(len(computations))]


def _bring_about(waits: Mapping[int, Wait], caller: object) -> dict[int, BaseException]:
    """All forwards that are waited for, those of one scheduler together; without any, a wait that others bring about.

    Returns:
        What that wait raised, by its key.
    """
    wanted: dict[Scheduler, list[ForwardRequest]] = {}
    for at in sorted(waits):
        if isinstance(wait := waits[at], Forwards):
            wanted.setdefault(wait.scheduler, []).extend(wait.requests)
    for scheduler, requests in wanted.items():
        scheduler.run(requests, caller)
    if any(wait.over for wait in waits.values()):
        return {}
    first = min(sorted(waits), key=lambda at: waits[at].lasting)
    try:
        waits[first].block()
    except BaseException as error:  # noqa: BLE001 - the computation's own
        return {first: error}
    return {}
