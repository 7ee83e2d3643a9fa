"""The cost of a question for which several requests are sent (retries, hedging)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..budget import money
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
            self._question.owe(total_charge([new_request for new_request in self._charges if new_request is not None]))

        return owe


def total_charge(charges: Sequence[Charge]) -> Charge | None:
    """The sum; None for no charges; dollars None if one of them is unknown."""
    if not charges:
        return None
    known = [charge.usd for charge in charges if charge.usd is not None]
    usd = money.total(known) if len(known) == len(charges) else None
    return Charge(usd=usd, llm_tokens=sum(charge.llm_tokens for charge in charges))
