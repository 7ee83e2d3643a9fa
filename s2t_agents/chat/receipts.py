"""Escalations as a ledger keeps them: a receipt each."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal

from ..ledger import Receipt
from ..types import Charge, EscalationRecord, Step
from .step_records import MS, candidate_records


def receipt_of(step: Step, decode: Callable[[int], str]) -> Receipt:
    """The receipt of a step's escalation."""
    assert step.escalation is not None
    question = EscalationRecord(step.prefix_tokens, step.candidates, step.escalation)
    would = step.shadow.token_id if step.shadow is not None else None
    return receipt(question, decode, step=step.index, wanted=step.wanted_id, pick=step.token_id, would_pick=would)


def receipt(
    question: EscalationRecord,
    decode: Callable[[int], str],
    *,
    step: int,
    wanted: int | None = None,
    pick: int | None = None,
    would_pick: int | None = None,
) -> Receipt:
    """The receipt of an escalation; without ``pick`` the answer ended at it."""
    report = question.report
    return Receipt(
        step=step,
        prefix_tokens=question.prefix_tokens,
        candidates=candidate_records(question.candidates, decode),
        wanted=wanted,
        pick=pick,
        would_pick=would_pick,
        outcome=report.outcome,
        reserved=report.reserved,
        actual=Charge(Decimal(0), escalations=0) if report.replayed else report.actual,
        refused_by=report.refused_by,
        wait_ms=report.wait_s * MS,
        reason=report.reason,
    )
