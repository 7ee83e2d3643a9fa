"""One generation's escalations: knows what each would cost, holds it, asks, settles."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import replace
from types import TracebackType

from ..budget import Amount, Budget, Hold
from ..errors import BadLimit, BudgetError, BudgetExceeded, HoldClosed, S2TError, StoreUnavailable, UnpricedModel
from ..selectors.llm import LLMSelector, LLMSession
from ..selectors.question import Answer, Question
from ..types import Charge, EscalationReport, Outcome, RefusedBy
from .pacing import Pace
from .paid_groups import PaidGroups

HOLD_S = 300.0
"""Seconds after which a hold lapses should this process die, at least."""
HOLD_LONGER_S = 60.0
"""Seconds by which a hold outlives the LLM's own deadline."""
HOLD_WITHOUT_DEADLINE_S = 3600.0
"""The same for an LLM without a deadline, as one on this machine: longer than it takes to load and answer."""


class EscalationDesk:
    """One generation's escalations. A context manager.

    Args:
        llm: who is asked.
        budget: what it may cost; None sets no limit.
        margin: selections less sure than this go up.
        pace: decides how sure is sure enough while the budget shrinks.
        groups: takes every paid selection.
    """

    def __init__(
        self,
        llm: LLMSelector,
        budget: Budget | None,
        margin: float,
        *,
        pace: Pace | None = None,
        groups: PaidGroups | None = None,
    ) -> None:
        self._llm, self._budget, self.margin = llm, budget, margin
        self._pace, self._groups = pace, groups
        self._hold_s = _hold_s(llm)
        self._session: LLMSession = llm.open()

    def __enter__(self) -> EscalationDesk:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._session.close()

    def wants(self, margin: float) -> bool:
        """Whether a selection this sure goes up."""
        if self._pace is None or self._budget is None:
            return margin < self.margin
        try:
            return self._pace.wants(margin, self._budget, at_most=self.margin)
        except StoreUnavailable:  # what is left is unknown; the reservation is refused, and the report says why
            return margin < self.margin

    def ask(self, question: Question) -> tuple[Answer | None, EscalationReport | None]:
        """Put the question, if the budget holds it.

        Returns:
            The answer (None: keep the local pick) and what happened (None: nothing, there was nothing to ask).

        Raises:
            BudgetExceeded: only where the budget's ``on_exhausted`` is not "degrade".
        """
        started = time.perf_counter()
        try:
            quote = self._session.quote(question)
            if quote is None:
                return None, None
            wanted = Amount.of(quote)
        except S2TError as error:
            return None, _report("failed", None, None, started, str(error))
        try:
            hold = self._budget.reserve(wanted, ttl_s=self._hold_s) if self._budget else None
        except (BudgetExceeded, StoreUnavailable, UnpricedModel) as error:
            return None, self._refusal(error, quote, started)
        answer, reason = self._put(question, hold, quote)
        if self._pace is not None:
            self._pace.paid(Amount.of(question.owed or quote))
        return answer, _report("picked" if answer else "failed", quote, question.owed, started, reason)

    def _put(self, question: Question, hold: Hold | None, quote: Charge) -> tuple[Answer | None, str]:
        """The answer, or the reason why there is none; the hold is closed in any case."""
        answer: Answer | None = None
        reason = ""
        try:
            if self._budget is not None and question.seconds is None:
                question.seconds = self._budget.seconds_left()
            answer = self._session.ask(question)
            reason = answer.note
        except S2TError as error:  # a dead LLM never takes the answer down
            reason = str(error)
        finally:  # also when the caller is cancelled while the LLM thinks
            question.owed = _countable(question.owed, quote)
            _close(hold, question.owed)
        if answer is not None and self._groups is not None and question.owed is not None:
            self._groups.add(question, answer)
        return answer, reason

    def _refusal(self, error: BudgetError | UnpricedModel, quote: Charge, started: float) -> EscalationReport:
        if isinstance(error, BudgetExceeded) and self._budget is not None and self._budget.on_exhausted != "degrade":
            raise error
        return replace(_report("refused", quote, None, started, str(error)), refused_by=_limit_of(error))


def _hold_s(llm: LLMSelector) -> float:
    """Seconds that a hold lives: a question must be answered within them, or others may spend the same money."""
    deadline = getattr(llm, "timeout_s", None)
    if not isinstance(deadline, int | float) or not math.isfinite(deadline):
        return HOLD_WITHOUT_DEADLINE_S
    return max(HOLD_S, deadline + HOLD_LONGER_S)


def _close(hold: Hold | None, owed: Charge | None) -> None:
    if hold is None:
        return
    with contextlib.suppress(HoldClosed, StoreUnavailable):  # lapsed: booked as overrun; store down: booked later
        hold.settle(Amount.of(owed)) if owed is not None else hold.release()


def _limit_of(error: BudgetError | UnpricedModel) -> RefusedBy | None:
    return RefusedBy(error.budget, error.unit, error.limit) if isinstance(error, BudgetExceeded) else None


def _report(
    outcome: Outcome, reserved: Charge | None, actual: Charge | None, started: float, reason: str
) -> EscalationReport:
    return EscalationReport(outcome, reserved, actual, time.perf_counter() - started, reason)


def _countable(owed: Charge | None, quote: Charge) -> Charge | None:
    """What is owed; what was held where the LLM states a cost that no budget can count."""
    try:
        if owed is not None:
            Amount.of(owed)
    except BadLimit:
        return quote
    return owed
