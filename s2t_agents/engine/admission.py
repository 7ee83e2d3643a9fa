"""How many generations run at once, who waits behind them, and when somebody is turned away.

First come, first served. A slot is held from the first step to the last: a consumer that stops reading a stream holds
it, and those behind it get a clear error when their patience is over, never a silent deadlock.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..errors import ConfigError, Overloaded


@dataclass(frozen=True)
class Concurrency:
    """Back-pressure of one engine.

    Attributes:
        running: generations that share the model's forwards, at most.
        waiting: generations that may queue behind them; 0 turns them away at once.
        wait_s: seconds that one waits for its turn.

    Raises:
        ConfigError: numbers that let nobody in.
    """

    running: int = 32
    waiting: int = 256
    wait_s: float = 120.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.running < 1 or self.waiting < 0 or not self.wait_s >= 0:
            raise ConfigError(
                f"running is {self.running}, waiting {self.waiting}, wait_s {self.wait_s}.",
                hint="At least 1 must run, and neither of the others may be negative.",
            )


class Gate:
    """The door of one engine."""

    def __init__(self, limits: Concurrency) -> None:
        self.limits = limits
        self._mutex = threading.Lock()
        self._running = 0
        self._queue: deque[threading.Event] = deque()

    @contextmanager
    def admitted(self) -> Iterator[float]:
        """A slot while the block runs; gives the seconds that it took to get it.

        Raises:
            Overloaded: the queue is full, or the wait was too long. Nothing has run.
        """
        started = time.monotonic()
        self._enter()
        try:
            yield time.monotonic() - started
        finally:
            self._leave()

    def _enter(self) -> None:
        with self._mutex:
            if self._running < self.limits.running and not self._queue:
                self._running += 1
                return
            if len(self._queue) >= self.limits.waiting:
                raise Overloaded(
                    f"{self._running} generations run and {len(self._queue)} wait; the limits are "
                    f"{self.limits.running} and {self.limits.waiting}.",
                    hint="Try again later, or raise Concurrency(running=..., waiting=...).",
                )
            turn = threading.Event()
            self._queue.append(turn)
        admitted = False
        try:
            admitted = turn.wait(self.limits.wait_s)
        finally:
            if not admitted:
                self._give_up(turn)
        if not admitted:
            raise Overloaded(
                f"no slot became free within {self.limits.wait_s:g} seconds; {self.limits.running} generations run.",
                hint="Close streams that are no longer read, or raise Concurrency(running=..., wait_s=...).",
            )

    def _give_up(self, turn: threading.Event) -> None:
        with self._mutex:
            if turn in self._queue:
                self._queue.remove(turn)
                return
        self._leave()  # the slot came in the same moment: it goes to the next

    def _leave(self) -> None:
        with self._mutex:
            if self._queue:
                self._queue.popleft().set()  # the slot goes straight to whoever waits first
            else:
                self._running -= 1
