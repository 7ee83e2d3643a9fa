"""Many generations at once in one thread: what each waits for is collected, and the forwards of all run together.

    generation a   ─ propose ─ wait ┐             ┌ select ─ wait ┐
    generation b   ─ propose ─ wait ┼─ scheduler ─┼ emit ─ propose┼─ scheduler ─ ...
    generation c   ─ ask     ─ wait ┘ (of each)   └ propose       ┘

For evaluation, collection and whatever else wants whole answers to many prompts: what is together in a forward depends
on the generations alone, never on the timing of threads.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeVar

from ..backends.torch.cpu_threads import single_threaded
from ..scheduling.admission import Place
from ..scheduling.requests import ForwardRequest
from ..scheduling.scheduler import Scheduler
from ..scheduling.waits import Forwards, Wait, Waiting
from ..types import Step

T = TypeVar("T")


def steps_of(generation: Generator[Place | Wait | Step, None, None]) -> Waiting[list[Step]]:
    """All steps of an ``Engine.generation``; to be gone on from by ``yield from``."""
    steps: list[Step] = []
    item = next(generation, None)
    while item is not None:
        if isinstance(item, Step):
            steps.append(item)
        else:
            try:
                yield item
            except BaseException as error:  # noqa: BLE001 - the generation's own
                item = generation.throw(error)
                continue
        item = next(generation, None)
    return steps


def together(computations: Sequence[Waiting[T]]) -> list[T]:
    """The results of all, in their order.

    Args:
        computations: each a generator of its waits, as ``steps_of``, or one that goes on from it.

    Raises:
        BaseException: what the first of them raised; the others are closed.
    """
    results: dict[int, T] = {}
    waits: dict[int, Wait] = {}

    def resume(at: int) -> None:
        waits.pop(at, None)
        try:
            waits[at] = next(computations[at])
        except StopIteration as end:
            results[at] = end.value

    try:
        with single_threaded():
            for at in range(len(computations)):
                resume(at)
            while waits:
                _bring_about([waits[at] for at in sorted(waits)], computations)
                for at in [at for at in sorted(waits) if waits[at].over]:
                    resume(at)
    finally:
        for computation in computations:
            computation.close()
    return [results[at] for at in range(len(computations))]


def _bring_about(waits: Sequence[Wait], caller: object) -> None:
    """All forwards that are waited for, those of one scheduler together; without any, the wait that ends soonest."""
    wanted: dict[Scheduler, list[ForwardRequest]] = {}
    for wait in waits:
        if isinstance(wait, Forwards):
            wanted.setdefault(wait.scheduler, []).extend(wait.requests)
    for scheduler, requests in wanted.items():
        scheduler.run(requests, caller)
    if not any(wait.over for wait in waits):
        min(waits, key=lambda wait: isinstance(wait, Place)).block()
