"""One generation's escalations: quote, reserve, ask, settle."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from ..backends.deadline import Deadline
from ..budget import Budget, Hold
from ..budget.quantities import charge_of, quantities_of
from ..errors import (
    BadLimit,
    BudgetError,
    BudgetExceeded,
    EscalationFailed,
    S2TError,
    StoreUnavailable,
    UnpricedModel,
)
from ..llms.base import LLMSelector, LLMSession, asking
from ..llms.question import Answer, Conversation, Question, candidates_of
from ..scheduling.waits import Waiting
from ..types import Charge, EscalationRecord, EscalationReport, Outcome, RefusedBy
from .pacing import Pace
from .paid_groups import PaidGroups

ESCALATION_HOLD_S = 300.0
"""Seconds after which a hold lapses should this process die, at least."""
HOLD_LONGER_S = 60.0
"""Seconds by which a hold outlives the LLM's own deadline."""
HOLD_WITHOUT_DEADLINE_S = 3600.0
"""The same for an LLM without a deadline, as one on this machine: longer than it takes to load and answer."""


class EscalationSession:
    """One generation's escalations. A context manager.

    Args:
        llm: the LLM.
        budget: what escalations may cost; None sets no limit.
        margin: selections with a confidence margin below it are escalated.
        pace: lowers that margin as the budget is used up.
        groups: records every paid selection.
        on_asked: called after every question, also where the caller was interrupted or the budget raises.
        hold_s: seconds after which a question's hold lapses should this process die; None goes by the LLM's deadline.
        conversation: what is answered, for an LLM with another tokenizer.
        deadline: of the generation; no question takes longer than until its end.
    """

    def __init__(
        self,
        llm: LLMSelector,
        budget: Budget | None,
        margin: float,
        *,
        pace: Pace | None = None,
        groups: PaidGroups | None = None,
        on_asked: Callable[[EscalationRecord], None] | None = None,
        hold_s: float | None = None,
        conversation: Conversation | None = None,
        deadline: Deadline | None = None,
    ) -> None:
        self._conversation, self._deadline = conversation, deadline
        self._llm, self._budget, self.margin = llm, budget, margin
        self._pace, self._groups, self._on_asked = pace, groups, on_asked
        self._hold_s = _hold_s(llm) if hold_s is None else hold_s
        self._unreachable: StoreUnavailable | None = None  # one answer waits once for a store that is gone
        self._llm_session: LLMSession = llm.open()
        degrades = budget is not None and budget.on_exhausted == "degrade"  # else a question may yet be none
        least = getattr(self._llm_session, "least", None) if degrades else None
        self._prices = (self._llm_session.quote,) if least is None else (least, self._llm_session.quote)

    def __enter__(self) -> EscalationSession:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._llm_session.close()

    def should_escalate(self, margin: float) -> bool:
        """Whether a selection with this confidence margin is put to the LLM."""
        if self._pace is None or self._budget is None or self._unreachable is not None:
            return margin < self.margin
        try:
            return self._pace.should_escalate(margin, self._budget, at_most=self.margin)
        except StoreUnavailable:  # what is left is unknown; the reservation is refused, and the report says why
            return margin < self.margin

    def escalating(self, question: Question) -> Waiting[tuple[Answer | None, EscalationReport | None]]:
        """Put a question to the LLM, if the budget holds what it may cost; none more once its store was unreachable.

        Returns:
            The answer (None: the local pick stands) and the report (None: there was nothing to ask).

        Raises:
            BudgetExceeded: only where the budget's ``on_exhausted`` is not "degrade".
        """
        started = time.perf_counter()
        question.conversation = self._conversation
        hold: Hold | None = None
        for price in self._prices:
            if hold is not None:
                hold.close(None)  # the budget has room for the least that it may cost
            try:
                priced = price(question)
                if priced is None:
                    return None, None
                quote = _counted(priced)
            except Exception as error:  # noqa: BLE001 - an LLM of the caller's own may raise anything
                return None, self._reported(question, None, _report("failed", None, None, started, _reason(error)))
            try:
                if self._unreachable is not None:
                    raise self._unreachable
                hold = self._budget.reserve(quote, ttl_s=self._hold_s) if self._budget else None
            except (BudgetExceeded, StoreUnavailable, UnpricedModel, BadLimit) as error:
                report = self._reported(question, None, _refused(error, quote, started))
                self._unreachable = error if isinstance(error, StoreUnavailable) else None
                if isinstance(error, BudgetExceeded) and self._budget and self._budget.on_exhausted != "degrade":
                    raise
                return None, report
        answer, report = yield from self._ask(question, hold, quote, started)
        if self._pace is not None:
            self._pace.add_charge(report.actual or quote)
        return answer, report

    def _ask(
        self, question: Question, hold: Hold | None, quote: Charge, started: float
    ) -> Waiting[tuple[Answer | None, EscalationReport]]:
        """The answer, if there is one, and the report; the hold is closed and the question reported in any case."""
        answer: Answer | None = None
        outcome: Outcome = "failed"
        reason = ""
        try:
            if question.seconds is None:
                question.seconds = self._seconds_left()
            answer = checked_answer((yield from asking(self._llm_session, question)), question)
            outcome, reason = "picked", answer.note
        except Exception as error:  # noqa: BLE001 - a dead or broken LLM never takes the answer down
            reason = _reason(error)
        except BaseException as error:  # the caller leaves while the LLM thinks
            outcome = "interrupted"
            reason = _reason(error)
            raise
        finally:
            if question.owed is None and outcome == "picked":
                question.owe(quote)  # unknown is not free
            owed = question.owed = _counted_or(quote, question.owed)
            try:
                if hold is not None:
                    hold.close(owed)
            finally:
                report = self._reported(question, answer, _report(outcome, quote, owed, started, reason))
        if answer is not None and self._groups is not None:
            self._groups.add(question, answer)
        return answer, report

    def _seconds_left(self) -> float | None:
        """Seconds that a question may take; None sets no limit."""
        of_budget = self._budget.seconds_left() if self._budget is not None else None
        of_answer = self._deadline.end_s() if self._deadline is not None else math.inf
        least = of_answer if of_budget is None else min(of_budget, of_answer)
        return least if least < math.inf else None

    def _reported(self, question: Question, answer: Answer | None, report: EscalationReport) -> EscalationReport:
        """The report, after ``on_asked`` was called with it."""
        if self._on_asked is not None:
            self._on_asked(EscalationRecord(len(question.ids), candidates_of(question, answer), report))
        return report


def llm_deadline_s(llm: LLMSelector) -> float | None:
    """Seconds that an LLM may take for a question; None where it sets no limit."""
    deadline = getattr(llm, "timeout_s", None)
    return deadline if isinstance(deadline, int | float) and math.isfinite(deadline) else None


def _hold_s(llm: LLMSelector) -> float:
    """Seconds until a hold lapses: longer than the question may take, since others could then spend the same money."""
    deadline = llm_deadline_s(llm)
    return HOLD_WITHOUT_DEADLINE_S if deadline is None else max(ESCALATION_HOLD_S, deadline + HOLD_LONGER_S)


def checked_answer(answer: object, question: Question) -> Answer:
    """An answer that can be followed, its scores as floats.

    Raises:
        EscalationFailed: it is none, or has not one score a candidate, all of them numbers or None and one finite.
    """
    if not isinstance(answer, Answer):
        raise EscalationFailed(f"the LLM gave a {type(answer).__name__} for an answer.")
    given = answer.scores
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != len(question.candidates):
        raise EscalationFailed(f"the LLM did not give one score for each of {len(question.candidates)} candidates.")
    scores = tuple(None if score is None else _number(score) for score in given)
    known = [score for score in scores if score is not None]
    if not any(map(math.isfinite, known)) or any(math.isnan(score) or score == math.inf for score in known):
        raise EscalationFailed("the LLM's scores are not finite: nothing can be picked by them.")
    top = question.prefix.model.vocab_size if question.prefix is not None else math.inf
    then = answer.then
    if not isinstance(then, Sequence) or not all(type(token) is int and 0 <= token < top for token in then):
        raise EscalationFailed("the LLM gave something else than token ids to follow its pick.")
    if answer.instead is not None and not (type(answer.instead) is int and 0 <= answer.instead < top):
        raise EscalationFailed("the LLM wrote something else than a token id.")
    return Answer(scores, tuple(then), answer.note if isinstance(answer.note, str) else "", answer.instead)


def _number(score: Any) -> float:
    try:
        if not isinstance(score, str | bytes | bool):
            return float(score)
    except Exception:  # noqa: BLE001 - float() of another library's type may raise anything
        pass
    raise EscalationFailed(f"the LLM gave a {type(score).__name__} for a score.")


def _reason(error: BaseException) -> str:
    """This package's errors in full; of others only the type, since their text may hold secrets."""
    return str(error) if isinstance(error, S2TError) else f"{type(error).__name__} while the LLM was asked."


def _refused(error: BudgetError | UnpricedModel | BadLimit, quote: Charge, started: float) -> EscalationReport:
    limit = RefusedBy(error.budget, error.unit, error.limit) if isinstance(error, BudgetExceeded) else None
    return replace(_report("refused", quote, None, started, str(error)), refused_by=limit)


def _report(
    outcome: Outcome, reserved: Charge | None, actual: Charge | None, started: float, reason: str
) -> EscalationReport:
    return EscalationReport(outcome, reserved, actual, time.perf_counter() - started, reason)


def _counted(charge: Charge) -> Charge:
    """The charge of an LLM, exactly as a budget counts it.

    Raises:
        BadLimit: no budget can count it.
    """
    return charge_of(quantities_of(charge))


def _counted_or(quote: Charge, owed: Charge | None) -> Charge | None:
    """What is owed; what was held where the LLM states something that no budget can count."""
    try:
        return None if owed is None else _counted(owed)
    except BadLimit:
        return quote
