"""What an answer of the local model takes from a budget: itself, its tokens, its time.

prompt known ──> reserve: one answer and all tokens that it may have, or as many as are left
     │
queue, prompt, steps ──> deadline over? ──yes──> the answer ends here, or BudgetExceeded, as the budget says
     │no                 (store away: the deadline known last)
end ──> settle the tokens that came; release if none did
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from decimal import Decimal
from typing import NamedTuple

from ..budget import Budget, Charge, Hold
from ..errors import AnswerTimeout, BudgetExceeded, StoreUnavailable
from ..scheduling.admission import AdmissionTicket
from ..types import RefusedBy, Step

ANSWER_HOLD_S = 3600.0
"""Seconds after which a hold lapses should this process die: longer than an answer takes."""
TRIES = 100
"""Reservations of what is left, where others take some of it in between."""


class KnownDeadline(NamedTuple):
    """A budget's deadline, as its store had it last.

    Attributes:
        at: when, by ``time.perf_counter``.
        limit: whose; None without one.
    """

    at: float
    limit: RefusedBy | None


NEVER = KnownDeadline(math.inf, None)


class LocalWork:
    """The local work of one answer, and its ``Deadline``.

    Args:
        budget: what limits it; one without limits on local work is not asked.
        begun: tokens of an interrupted try at this answer, which that try has settled.
        timeout_s: seconds from now in which the answer has to be whole; None sets no limit.

    Attributes:
        begun: as given.
        stopped_by: the limit that ended the answer; None if none did.
    """

    def __init__(self, budget: Budget | None, begun: Sequence[int] = (), *, timeout_s: float | None = None) -> None:
        self._budget = budget if budget is not None and budget.limits_local_work else None
        self.begun = begun
        self._hold: Hold | None = None
        self._cut: BudgetExceeded | None = None
        self._room = 0
        self._next_look = math.inf
        """When to look at the budget's clock again, by ``time.perf_counter``; infinite without a deadline."""
        self._timeout_s, self._made = timeout_s, 0
        self._end = math.inf if timeout_s is None else time.perf_counter() + timeout_s
        self._known = NEVER
        self._late: BudgetExceeded | StoreUnavailable | None = None
        self.stopped_by: RefusedBy | None = None

    def reserve(self, tokens: int) -> int:
        """Hold the answer and its tokens, or as many as are left.

        Args:
            tokens: that the answer may have, begun ones included.

        Returns:
            How many of them it has.

        Raises:
            BudgetExceeded: no answer, not one token, or no time is left.
            StoreUnavailable: the store cannot be reached, so nothing may be spent.
        """
        if self._budget is None:
            return tokens
        wanted = max(0, tokens - len(self.begun))
        for _ in range(TRIES):
            charge = Charge(Decimal(0), escalations=0, answers=0 if self.begun else 1, answer_tokens=wanted)
            try:
                self._hold = self._budget.reserve(charge, ttl_s=ANSWER_HOLD_S)
                self._schedule(self._budget)
                break
            except BudgetExceeded as refused:
                left = int(self._budget.available().get("answer_tokens", 0))
                if refused.unit != "answer_tokens" or left < 1:
                    raise
                wanted, self._cut = min(wanted, left), self._cut or refused
        else:
            raise self._cut or AssertionError
        self._room = min(tokens, len(self.begun) + wanted)
        return self._room

    def release(self) -> None:
        """Give everything back: the answer was never begun."""
        if self._hold is not None and self._hold.open:
            self._hold.close(None)

    def left_s(self) -> float:
        """See ``Deadline``."""
        return min(self._next_look, self._end) - time.perf_counter()

    def end_s(self) -> float:
        """See ``Deadline``: of the timeout, and of the budget as its store had it last."""
        return min(self._end, self._known.at) - time.perf_counter()

    def check(self) -> None:
        """See ``Deadline``; warns where a warning is due.

        Raises:
            AnswerTimeout: the timeout has passed.
            BudgetExceeded: the budget has no time left.
            StoreUnavailable: it had none by the deadline known last, and its store cannot be reached.
        """
        if self._is_late:
            raise self._timed_out()
        if self._budget is not None:
            self._look()

    def _look(self) -> None:
        assert self._budget is not None
        try:
            self._budget.warn()
            self._schedule(self._budget)
            over = self._next_look <= time.perf_counter()
            self._late = _refusal(self._budget, 0) if over else None
        except StoreUnavailable as away:  # whatever is due meanwhile waits for it, but for the end
            self._next_look = self._known.at
            self._late = away if self._known.at <= time.perf_counter() else None
        if self._late is not None:
            raise self._late

    def _schedule(self, budget: Budget) -> None:
        """Note the deadline, and when to look at the budget's clock again."""
        left = budget.seconds_to_next()
        if left is not None:
            self._next_look, self._known = time.perf_counter() + left, _deadline_of(budget)

    @property
    def too_short(self) -> BudgetExceeded | None:
        """Why the answer has fewer tokens than it may need; None if it has them all."""
        return self._cut

    def limiting(
        self, steps: Generator[AdmissionTicket | Step, None, None], eos_ids: Collection[int]
    ) -> Generator[AdmissionTicket | Step, None, None]:
        """Pass the steps on while there is time; settle them at the end.

        Args:
            steps: the engine's.
            eos_ids: tokens that end an answer; one without them that has used all of its tokens is cut off.

        Raises:
            AnswerTimeout: a token came after the timeout, and was not the last.
            BudgetExceeded: tokens or time ran out, and the budget's ``on_exhausted`` is not "degrade".
            StoreUnavailable: the same, by the deadline known last.
        """
        if self._timeout_s is not None:
            steps = self._in_time(steps)
        budget, hold = self._budget, self._hold
        if budget is None or hold is None:
            yield from steps
            return
        last: Step | None = None
        count = replayed = 0

        def settle() -> None:
            if hold.open:
                used = replace(hold.reserved, answer_tokens=count - replayed)
                hold.close(used if count else None)

        try:
            with closing(steps):
                for each in steps:
                    if isinstance(each, Step):
                        same = replayed == count < len(self.begun) and each.token_id == self.begun[count]
                        replayed, count, last = replayed + same, count + 1, each
                    yield each
                    if self._next_look <= time.perf_counter():
                        self._look()
                if self._cut is not None and last is not None and count >= self._room and last.token_id not in eos_ids:
                    settle()
                    self._stop(_still_refused(budget, self._cut), budget)
        except (BudgetExceeded, StoreUnavailable) as refused:
            if refused is not self._late:
                raise
            self._stop(refused, budget)
        finally:
            settle()

    def _in_time(
        self, steps: Generator[AdmissionTicket | Step, None, None]
    ) -> Generator[AdmissionTicket | Step, None, None]:
        """Pass the steps on, none behind one that comes after the timeout; how slowly they are read does not count."""
        late = False
        with closing(steps):
            for each in steps:
                if late:
                    raise self._timed_out()
                late = self._is_late
                self._made += isinstance(each, Step)
                yield each

    @property
    def _is_late(self) -> bool:
        return self._end <= time.perf_counter()

    def _timed_out(self) -> AnswerTimeout:
        came = "no token came" if not self._made else f"{self._made} token{'s' * (self._made > 1)} came"
        return AnswerTimeout(
            f"the answer was not whole within timeout={self._timeout_s:g} seconds: {came}.",
            hint="Give it more time, ask for fewer tokens (max_tokens), or let fewer run at once (concurrency).",
        )

    def _stop(self, refused: BudgetExceeded | StoreUnavailable, budget: Budget) -> None:
        if budget.on_exhausted != "degrade":
            raise refused
        if isinstance(refused, BudgetExceeded):
            self.stopped_by = RefusedBy(refused.budget, refused.unit, refused.limit)
        else:
            self.stopped_by = self._known.limit


def _deadline_of(budget: Budget) -> KnownDeadline:
    """The nearest deadline in the chain of a budget, as its store has it now."""
    now, states = time.perf_counter(), [each.state() for each in budget.chain]
    timed = [
        KnownDeadline(now + float(state.left["seconds"]), RefusedBy(state.path, "seconds", state.limit["seconds"]))
        for state in states
        if "seconds" in state.limit
    ]
    return min(timed, key=lambda each: each.at, default=NEVER)


def _refusal(budget: Budget, tokens: Decimal | float) -> BudgetExceeded | None:
    """Why so many more tokens are refused now; None if they are not.

    Raises:
        StoreUnavailable: the store cannot be reached, so nothing may be spent.
    """
    try:
        budget.reserve(Charge(Decimal(0), escalations=0, answer_tokens=int(tokens))).release()
    except BudgetExceeded as refused:
        return refused
    return None


def _still_refused(budget: Budget, cut: BudgetExceeded) -> BudgetExceeded:
    """The refusal as it is now; as it was, where it no longer is one, or where the store cannot be reached."""
    try:
        return _refusal(budget, cut.wanted) or cut
    except StoreUnavailable:
        return cut
