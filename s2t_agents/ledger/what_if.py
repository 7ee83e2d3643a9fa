"""Replay receipts under another budget: what would have been asked, refused and spent."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal

from ..budget import Budget
from ..budget.quantities import charge_of, plus, quantities_of
from ..errors import BudgetExceeded, UnpricedModel
from ..types import Charge
from .record import Frozen, GenerationRecord, Receipt

FREE = Charge(Decimal(0), escalations=0)


class WhatIf(Frozen):
    """What another budget would have done with the same questions.

    A receipt refused now leaves the local pick standing, one allowed now gets a pick that is unknown. From the first
    changed pick on the answers would have gone another way, so the rest is an approximation.

    Args:
        generations: how many were replayed.
        receipts: how many questions were replayed.
        allowed: would have been asked.
        refused: would have been refused.
        newly_allowed: allowed here, refused then.
        newly_refused: refused here, asked then.
        unknown: refused then without a note of what was wanted; left refused.
        changed_picks: tokens that would have come out differently, or might have.
        approximate: receipts that come after the first changed pick.
        first_change: (record id, step) of it; None when everything is exact.
        spent: what would have been spent, in USD (None if a price was unknown), escalations and LLM tokens.
    """

    generations: int = 0
    receipts: int = 0
    allowed: int = 0
    refused: int = 0
    newly_allowed: int = 0
    newly_refused: int = 0
    unknown: int = 0
    changed_picks: int = 0
    approximate: int = 0
    first_change: tuple[str, int] | None = None
    spent: Charge = FREE

    @property
    def exact(self) -> bool:
        """Whether no pick would have changed, so that every figure is exact."""
        return self.first_change is None


class _ReplayClock:
    """The time of the record being replayed."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now


def replay(records: Iterable[GenerationRecord], budget: Budget) -> WhatIf:
    """Put every receipt to a fresh copy of ``budget``; the records are in the order of their time."""
    clock = _ReplayClock()
    fresh: Budget | None = None
    seen = WhatIf()
    for record in records:
        clock.now = record.started_at.timestamp()
        fresh = fresh or budget.fresh(clock)
        seen = seen.model_copy(update={"generations": seen.generations + 1})
        for receipt in record.receipts:
            seen = _one(seen, record, receipt, fresh)
    return seen


def _one(seen: WhatIf, record: GenerationRecord, receipt: Receipt, budget: Budget) -> WhatIf:
    refused_then = receipt.outcome == "refused"
    want = receipt.reserved or receipt.actual
    unpaid = receipt.outcome in ("failed", "interrupted")
    cost = receipt.actual or (FREE if unpaid else want)
    allowed = want is not None and cost is not None and _fits(budget, want, cost)
    changed = _changed(receipt, allowed)
    happened = {
        "receipts": True,
        "allowed": allowed,
        "refused": not allowed,
        "newly_allowed": allowed and refused_then,
        "newly_refused": not allowed and not refused_then,
        "unknown": want is None,
        "changed_picks": changed,
        "approximate": not seen.exact,
    }
    counts = {name: getattr(seen, name) + 1 for name, so in happened.items() if so}
    first = seen.first_change or ((record.id, receipt.step) if changed else None)
    spent = seen.spent
    if allowed and cost is not None:
        spent = charge_of(plus(quantities_of(spent), quantities_of(cost)))
    return seen.model_copy(update={**counts, "first_change": first, "spent": spent})


def _changed(receipt: Receipt, allowed: bool) -> bool:
    """Whether the token would have come out differently, or might have."""
    if allowed:
        return receipt.outcome == "refused"
    return receipt.outcome == "picked" and receipt.local_pick() != receipt.pick


def _fits(budget: Budget, want: Charge, cost: Charge) -> bool:
    try:
        budget.reserve(want).settle(cost)
    except (BudgetExceeded, UnpricedModel):
        return False
    return True
