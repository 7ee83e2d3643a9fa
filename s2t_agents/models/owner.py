"""One owner of the model at a time: steps that are wanted at once go through in one forward.

Every generation runs in its own thread and calls ``Owner.step``. Whoever finds nobody leading leads: gathers what
waits, runs it as one packed forward, hands out the results, and gives the lead on as soon as its own step is done.

    thread a   step ──> lead: [a b c] ────────────> engine ... step ──> wait
    thread b   step ──> wait ─────────> engine ... step ──> lead: [b a c] ──>
    thread c   step ──> wait ─────────> engine ... step ──> wait

Before a forward the leader waits a little for those who were in the last one, so that lockstep comes about by itself;
somebody whose consumer pauses, or who waits for an LLM, is waited for once and not again.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from .packed import Segment

Outcome = tuple[Tensor, Tensor]
"""Logits ``[V]`` and last hidden state ``[H]`` after a step's last token."""

ALONE = 1024
"""Tokens of a prompt per forward when nobody else waits; bounds the memory of a forward."""

BESIDE = 256
"""Tokens of prompts per forward when others wait, so that a long prompt holds nobody up."""

ROWS = 64
"""Sequences per forward, at most."""

PATIENCE = 0.25
"""How long a leader waits for the others of the last forward, as a share of what that took."""

PATIENCE_S = 0.05
"""And at most so long, in seconds."""


class Ticket:
    """One step that is wanted: tokens to append to a cache, in parts if they are many.

    Attributes:
        turn: set when the caller can go on, or has to lead.
        leads: the lead is its caller's.
    """

    def __init__(self, ids: Tensor, cache: Cache) -> None:
        self.ids, self.cache = ids, cache
        self.start = self.length = int(cache.get_seq_length())
        self.outcome: Outcome | None = None
        self.error: Exception | None = None
        self.turn = threading.Event()
        self.leads = False

    @property
    def done(self) -> bool:
        """Whether the caller can go on."""
        return not len(self.ids) or self.error is not None

    def part(self, tokens: int) -> Segment:
        """The next so many tokens."""
        return Segment(self.ids[:tokens], self.cache, self.length)

    def went(self, tokens: int, outcome: Outcome) -> None:
        """So many tokens were read."""
        self.ids, self.outcome = self.ids[tokens:], outcome
        self.length += tokens

    def result(self) -> Outcome:
        """What the step said; after a failure the cache is as it was before."""
        if self.error is not None:
            roll_back(self.cache, self.start)
            raise self.error
        assert self.outcome is not None
        return self.outcome


class Owner:
    """Lets concurrent callers share forwards.

    Args:
        single: runs one segment; the plain way, for whoever is alone.
        packed: runs several; None where the model can not, and callers take turns.
        lock: held during forwards; a thread that holds it already runs its steps at once, alone.
    """

    def __init__(
        self,
        single: Callable[[Segment], Outcome],
        packed: Callable[[Sequence[Segment]], tuple[Tensor, Tensor]] | None,
        lock: Any,
    ) -> None:
        self._single, self._packed, self._lock = single, packed, lock
        self._mutex = threading.Lock()
        self._arrived = threading.Condition(self._mutex)
        self._waiting: deque[Ticket] = deque()
        self._led = False
        self._last: frozenset[int] = frozenset()
        self._took = 0.0

    def step(self, ids: Tensor, cache: Cache) -> Outcome:
        """Append ``ids`` ``[T]`` to ``cache``, together with whatever else is wanted now.

        Raises:
            Exception: what this step's own forward raised; the others' steps are run all the same.
        """
        ticket = Ticket(ids, cache)
        if self._lock._is_owned():  # an exclusive turn, such as a selector's; to wait for others would be for ever
            while not ticket.done:
                self._run([ticket], [ticket.part(ALONE)])
            return ticket.result()
        with self._mutex:
            self._waiting.append(ticket)
            self._arrived.notify()
            ticket.leads, self._led = not self._led, True
        try:
            if not ticket.leads:
                ticket.turn.wait()
            while not ticket.done:
                tickets, segments = self._gather()
                self._run(tickets, segments)
                self._hand_out(tickets)
        finally:
            self._leave(ticket)
        return ticket.result()

    def _gather(self) -> tuple[list[Ticket], list[Segment]]:
        """Who takes part in the next forward, and with which tokens: single tokens first, then parts of prompts."""
        with self._mutex:
            until = time.monotonic() + min(PATIENCE * self._took, PATIENCE_S)
            while not self._last <= {id(ticket.cache) for ticket in self._waiting}:
                left = until - time.monotonic()
                if left <= 0 or not self._arrived.wait(left):
                    break
            waiting = list(self._waiting)
        if self._packed is None:
            return waiting[:1], [waiting[0].part(BESIDE if len(waiting) > 1 else ALONE)]
        singles = [ticket for ticket in waiting if len(ticket.ids) == 1][:ROWS]
        room = BESIDE if singles else ALONE
        tickets, segments = singles, [ticket.part(1) for ticket in singles]
        for ticket in waiting:
            tokens = min(room, len(ticket.ids))
            if len(ticket.ids) > 1 and tokens:
                tickets.append(ticket)
                segments.append(ticket.part(tokens))
                room -= tokens
        return tickets, segments

    def _run(self, tickets: Sequence[Ticket], segments: Sequence[Segment]) -> None:
        """One forward; if it fails, one by one, so that only the guilty learns of it."""
        started = time.monotonic()
        with self._lock:
            if len(segments) == 1 or not self._together(tickets, segments):
                for ticket, segment in zip(tickets, segments, strict=True):
                    self._alone(ticket, segment)
        self._took = time.monotonic() - started

    def _together(self, tickets: Sequence[Ticket], segments: Sequence[Segment]) -> bool:
        """All in one forward; False if that failed and nothing has changed."""
        assert self._packed is not None
        try:
            logits, hidden = self._packed(segments)
        except BaseException as error:
            for segment in segments:
                roll_back(segment.cache, segment.length)
            if not isinstance(error, Exception):
                raise
            return False
        for at, (ticket, segment) in enumerate(zip(tickets, segments, strict=True)):
            ticket.went(len(segment.ids), (logits[at], hidden[at]))
        return True

    def _alone(self, ticket: Ticket, segment: Segment) -> None:
        try:
            ticket.went(len(segment.ids), self._single(segment))
        except Exception as error:  # noqa: BLE001 - the caller's own thread raises it
            ticket.error = error
        except BaseException:
            roll_back(segment.cache, segment.length)
            raise

    def _hand_out(self, tickets: Sequence[Ticket]) -> None:
        """Wake those whose step is done."""
        done = [ticket for ticket in tickets if ticket.done]
        with self._mutex:
            self._last = frozenset(id(ticket.cache) for ticket in tickets)
            self._waiting = deque(ticket for ticket in self._waiting if ticket not in done)
        for ticket in done:
            ticket.turn.set()

    def _leave(self, ticket: Ticket) -> None:
        """The caller goes on, or was interrupted: whoever waits first takes the lead, if it was the caller's."""
        with self._mutex:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            if not ticket.leads:
                return
            ticket.leads = False
            if self._waiting:
                self._waiting[0].leads = True
                self._waiting[0].turn.set()
            else:
                self._led = False


def roll_back(cache: Cache, length: int) -> None:
    """Forget what a failed forward may have written behind a sequence's end."""
    for layer in cache.layers:
        extra = layer.get_seq_length() - length
        if extra > 0 and layer.is_croppable:
            layer.crop(-extra)
