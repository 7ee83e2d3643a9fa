"""Admission: how many generations run at once, how many queue behind them, and when one is refused.

First come, first served. A slot is held from the first step to the last: a consumer that stops reading a stream holds
it, and generations queued behind it end with ``Overloaded`` after ``wait_s``, never in a silent deadlock.

What a generation calls while it computes (``on_step``, a token's callback, a judge and its tools) may call the same
model again: that call shares the generation's slot, since to wait for it would be to wait for itself.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

from ..backends.deadline import Deadline
from ..call_scope import callers
from ..errors import ConfigError, Overloaded
from ..fork_safety import hold_while_forking, renew_in_child
from .waits import Wait

DEEPEST = 8
"""Generations that call one another; one that always calls another would go on until memory ends."""


@dataclass(frozen=True)
class Concurrency:
    """Back-pressure of one engine.

    Attributes:
        running: generations that share the model's forwards, at most.
        waiting: generations that may queue behind them; 0 turns them away at once.
        wait_s: seconds that one waits for its turn; infinite is for ever.

    Raises:
        ConfigError: numbers that admit no generation.
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


class AdmissionTicket(Wait):
    """One generation's ticket at an engine: queued at first, then admitted to a slot.

    Attributes:
        queue: of the engine.
        process: whose it is; a forked child inherits its parent's tickets, but none of them counts there.
        admitted: done when the slot is there. Only the queue completes it: it takes no cancellation.
    """

    lasting = True

    def __init__(self, queue: AdmissionQueue, deadline: Deadline | None = None) -> None:
        self.admitted: Future[None] = Future()
        self.admitted.set_running_or_notify_cancel()
        self.process = os.getpid()
        self.queue, self._limits, self._since = queue, queue.limits, time.monotonic()
        self._deadline = deadline

    @property
    def left_s(self) -> float:
        """Seconds that it still waits, at most, or until its generation's deadline is to be looked at."""
        deadline_s = math.inf if self._deadline is None else self._deadline.left_s()
        return min(max(min(self._patience_s, deadline_s), 0.0), threading.TIMEOUT_MAX)

    @property
    def _patience_s(self) -> float:
        return self._since + self._limits.wait_s - time.monotonic()

    @property
    def over(self) -> bool:
        """The slot is there."""
        return self.admitted.done()

    def block(self) -> None:
        """See ``wait``."""
        self.wait()

    def wait(self) -> float:
        """Block until it is admitted; gives the seconds since the ticket was taken.

        Raises:
            Overloaded: the wait was too long. Nothing has run.
            S2TError: of the deadline.
        """
        while not self._admitted_in_time():
            if self._deadline is not None and self._deadline.left_s() <= 0:
                self._deadline.check()
            if self._patience_s <= 0:
                raise Overloaded(
                    f"no slot became free within {self._limits.wait_s:g} seconds; {self._limits.running} generations "
                    "run.",
                    hint="Close streams that are no longer read, or raise Concurrency(running=..., wait_s=...).",
                )
        return time.monotonic() - self._since

    def _admitted_in_time(self) -> bool:
        try:
            self.admitted.result(self.left_s)
        except TimeoutError:
            return False
        return True


class AdmissionQueue:
    """Admission control of one engine: its slots, and the generations that wait for one."""

    def __init__(self, limits: Concurrency) -> None:
        self.limits = limits
        self._mutex = threading.RLock()  # the garbage collector may close a lost stream in the middle of a change
        hold_while_forking(self, "_mutex")
        renew_in_child(self._empty)
        self._running, self._process = 0, os.getpid()
        self._queue: deque[AdmissionTicket] = deque()

    @property
    def running(self) -> int:
        """Generations that have a slot."""
        return self._running

    @property
    def queued(self) -> int:
        """Generations that wait for one."""
        return len(self._queue)

    @contextmanager
    def enter(self, deadline: Deadline | None = None) -> Iterator[AdmissionTicket]:
        """A ticket while the block lasts: its generation may run once ``AdmissionTicket.admitted`` is done.

        Args:
            deadline: of the generation; ends its wait.

        Raises:
            Overloaded: the queue is full, or too many generations call one another. Nothing has run.
        """
        around = callers()
        outer = {each.ticket for each in around if isinstance(each.ticket, AdmissionTicket)}
        outer = {ticket for ticket in outer if ticket.queue is self}
        if len(outer) >= DEEPEST:
            raise Overloaded(
                f"{len(outer)} generations of one model wait for one another, each called by the one before.",
                hint="Let on_step, callbacks and judges not call their own model without end.",
            )
        ticket = self._shared() if outer else self._new_ticket(deadline)
        own = [caller for caller in around if caller.ticket is None]
        for caller in own:
            caller.ticket = ticket
        try:
            yield ticket
        finally:
            for caller in own:
                caller.ticket = None
            if not outer:
                self._leave(ticket)

    def _empty(self) -> None:
        """In a forked child: the parent's generations do not exist there."""
        self._running, self._queue, self._process = 0, deque(), os.getpid()

    def _shared(self) -> AdmissionTicket:
        ticket = AdmissionTicket(self)
        ticket.admitted.set_result(None)
        return ticket

    def _new_ticket(self, deadline: Deadline | None) -> AdmissionTicket:
        ticket = AdmissionTicket(self, deadline)
        with self._mutex:
            if self._running < self.limits.running and not self._queue:
                self._running += 1
                ticket.admitted.set_result(None)
            elif len(self._queue) < self.limits.waiting:
                self._queue.append(ticket)
            else:
                raise Overloaded(
                    f"{self._running} generations run and {len(self._queue)} wait; the limits are "
                    f"{self.limits.running} and {self.limits.waiting}.",
                    hint="Try again later, or raise Concurrency(running=..., waiting=...).",
                )
        return ticket

    def _leave(self, ticket: AdmissionTicket) -> None:
        with self._mutex:
            if ticket.process != self._process:
                return
            if not ticket.admitted.done():
                self._queue.remove(ticket)
            elif self._queue:
                self._queue.popleft().admitted.set_result(None)  # the slot goes straight to the first in the queue
            else:
                self._running -= 1
