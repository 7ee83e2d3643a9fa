"""The cost of a question for which several requests are sent (retries, hedging)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..budget.charges import sum_of
from ..types import Charge
from .question import Question

ReportCharge = Callable[[Charge | None], None]
"""Reports the cost of one request so far; the last report counts."""


class RequestCosts:
    """Sums the costs of one question's requests.

    Args:
        question: its ``owe`` is called with the sum whenever a request reports.
    """

    def __init__(self, question: Question) -> None:
        self._question = question
        self._charges: list[Charge | None] = []

    def __len__(self) -> int:
        """Number of requests so far."""
        return len(self._charges)

    def new_request(self) -> ReportCharge:
        """Register a request; returns the callback with which it reports its cost."""
        at = len(self._charges)
        self._charges.append(None)

        def owe(charge: Charge | None) -> None:
            self._charges[at] = charge
            self._question.owe(total_charge([each for each in self._charges if each is not None]))

        return owe


def total_charge(charges: Sequence[Charge]) -> Charge | None:
    """The sum, which is one escalation; None for no charges."""
    return replace(sum_of(charges), escalations=1) if charges else None
