"""One owner of the model at a time: steps that are wanted at once go through in one forward.

Every generation runs in its own thread and calls ``Owner.step`` and ``Owner.look``. Whoever finds nobody leading leads:
gathers what waits, runs it as one packed forward, hands out the results, and gives the lead on as soon as its own wish
is done.

    thread a   step ──> lead: [a b c] ────────────> engine ... step ──> wait
    thread b   step ──> wait ─────────> engine ... step ──> lead: [b a c] ──>
    thread c   look ──> wait ─────────> engine ... step ──> wait

Before a forward the leader waits a little for those who were in the last one, so that lockstep comes about by itself;
somebody whose consumer pauses, or who waits for an LLM, is waited for once and not again. The time of a forward is
divided among those who took part, by their rows.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from math import inf
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from ..backends.torch.compute_time import Meter
from ..backends.torch.cpu_threads import Team, release
from ..backends.torch.packed_batch import Look, Outcome, Part
from ..fork_safety import hold_while_forking, renew_in_child
from .requests import LookTicket, StepTicket, Ticket

ALONE = 1024
"""Tokens of a prompt per forward when nobody else waits; bounds the memory of a forward."""

BESIDE = 256
"""Tokens of prompts per forward when others wait, so that a long prompt holds nobody up."""

ROWS = 64
"""Sequences per forward, at most."""

CANDIDATES = 256
"""Candidates per forward, of all selections together; the first selection is always taken whole."""

PATIENCE = 0.25
"""How long a leader waits for the others of the last forward, as a share of what that took."""

PATIENCE_S = 0.05
"""And at most so long, in seconds."""

LONG_S = 0.01
"""Seconds of a step from which a model's forwards go to a thread of their own, which costs 0.1 ms."""


class Owner:
    """Lets concurrent callers share forwards.

    Args:
        single: runs one part; the plain way, for whoever is alone.
        packed: runs several; None where the model cannot, and callers take turns.
        lock: held during forwards; a thread that holds it already runs its steps at once, alone.
        long_s: see ``LONG_S``.
        beside: see ``BESIDE``.
        alone: see ``ALONE``.
    """

    def __init__(
        self,
        single: Callable[[Part], Outcome | Tensor],
        packed: Callable[[Sequence[Part]], Sequence[Outcome | Tensor]] | None,
        lock: Any,
        long_s: float = LONG_S,
        beside: int = BESIDE,
        alone: int = ALONE,
    ) -> None:
        self._single, self._packed, self._lock = single, packed, lock
        self._beside, self._alone_at_most = beside, alone
        self._mutex = threading.Lock()
        hold_while_forking(self, "_mutex")
        renew_in_child(self._forget)
        self._arrived = threading.Condition(self._mutex)
        self._waiting: deque[Ticket] = deque()
        self._led = False
        self._last: frozenset[int] = frozenset()
        self._took = 0.0
        self._team, self._long_s, self._step_s = Team(), long_s, inf

    def step(self, ids: Tensor, cache: Cache, meter: Meter | None = None) -> Outcome:
        """Append ``ids`` ``[T]`` to ``cache``, together with whatever else is wanted now.

        Raises:
            Exception: what this step's own forward raised; the others' are run all the same.
        """
        ticket = StepTicket(ids, cache, meter)
        self._settle(ticket)
        return ticket.result()

    def look(self, look: Look, meter: Meter | None = None) -> Tensor:
        """Hidden states ``[K, H]`` of candidates, together with whatever else is wanted now; errors as ``step``."""
        ticket = LookTicket(look, meter)
        self._settle(ticket)
        return ticket.result()

    def _forget(self) -> None:
        """Whoever led or waited did not come along into the child."""
        self._waiting, self._led, self._last = deque(), False, frozenset()

    def pause(self) -> None:
        """A generation has ended. A hint: garbage collection may give it inside any block of this very thread."""
        if self._mutex.acquire(blocking=False):
            try:
                if not self._led:
                    self._team.pause()
            finally:
                self._mutex.release()

    def _settle(self, ticket: Ticket) -> None:
        """Returns when the ticket is done, by this thread's lead or by another's."""
        if self._lock._is_owned():  # an exclusive turn, such as a selector's; to wait for others would be for ever
            while not ticket.done:
                self._run([ticket], [ticket.part(self._alone_at_most)])
            return
        with self._mutex:
            self._waiting.append(ticket)
            self._arrived.notify()
            ticket.leads, self._led = not self._led, True
        try:
            if not ticket.leads:
                ticket.turn.wait()
            while not ticket.done:
                tickets, parts = self._gather()
                self._run(tickets, parts)
                self._hand_out(tickets)
        finally:
            self._leave(ticket)

    def _gather(self) -> tuple[list[Ticket], list[Part]]:
        """Who takes part in the next forward: single tokens and looks first, then parts of prompts."""
        with self._mutex:
            until = time.monotonic() + min(PATIENCE * self._took, PATIENCE_S)
            while not self._last <= {id(ticket.cache) for ticket in self._waiting}:
                left = until - time.monotonic()
                if left <= 0 or not self._arrived.wait(left):
                    break
            waiting = list(self._waiting)
        if self._packed is None:
            return waiting[:1], [waiting[0].part(self._beside if len(waiting) > 1 else self._alone_at_most)]
        tickets = brief(waiting)
        parts = [ticket.part(ticket.rows) for ticket in tickets]
        room = self._beside if tickets else self._alone_at_most
        for ticket in waiting:
            tokens = min(room, ticket.rows)
            if not ticket.brief and tokens:
                tickets.append(ticket)
                parts.append(ticket.part(tokens))
                room -= tokens
        return tickets, parts

    def _run(self, tickets: Sequence[Ticket], parts: Sequence[Part]) -> None:
        """One forward; if it fails, one by one, so that only the guilty learns of it."""
        brief = all(ticket.brief for ticket in tickets)
        leading = not self._lock._is_owned()  # else it is an exclusive turn, and somebody else may lead

        def forward() -> None:
            with self._lock:
                started = time.monotonic()
                if len(parts) == 1 or not self._together(tickets, parts):
                    for ticket, part in zip(tickets, parts, strict=True):
                        self._alone(ticket, part)
                self._took = time.monotonic() - started

        long = self._step_s > self._long_s
        if long and leading:
            self._team.apart(forward)
        else:
            self._team.here(forward)
            if long:
                release()
        if brief:  # a step that a selection has read already says little of the next one: hence the memory
            self._step_s = max(self._took, 0.8 * self._step_s) if self._step_s < inf else self._took
        if leading and self._step_s <= self._long_s:
            self._team.rest()

    def _together(self, tickets: Sequence[Ticket], parts: Sequence[Part]) -> bool:
        """All in one forward; False if that failed and nothing has changed."""
        assert self._packed is not None
        started = time.monotonic()
        try:
            said = self._packed(parts)
        except BaseException as error:
            for ticket in tickets:
                ticket.undo()
            if not isinstance(error, Exception):
                raise
            return False
        per_row = (time.monotonic() - started) / sum(len(part.ids) for part in parts)
        for ticket, part, each in zip(tickets, parts, said, strict=True):
            ticket.went(part, each)
            ticket.meter.add(per_row * len(part.ids))
        return True

    def _alone(self, ticket: Ticket, part: Part) -> None:
        started = time.monotonic()
        try:
            ticket.went(part, self._single(part))
        except Exception as error:  # noqa: BLE001 - the caller's own thread raises it
            ticket.error = error
        except BaseException:
            ticket.undo()
            raise
        ticket.meter.add(time.monotonic() - started)

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


def brief(waiting: Sequence[Ticket]) -> list[Ticket]:
    """Those that one forward settles, first come first served, within what a forward may hold."""
    taken: list[Ticket] = []
    candidates = 0
    for ticket in waiting:
        if not ticket.brief or len(taken) == ROWS:
            continue
        if isinstance(ticket, LookTicket):
            if candidates and candidates + ticket.rows > CANDIDATES:
                continue
            candidates += ticket.rows
        taken.append(ticket)
    return taken
