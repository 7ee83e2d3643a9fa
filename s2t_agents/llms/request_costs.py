"""What a question owes when more than one request may be put for it: each has its own line, the sum is owed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal

from ..types import Charge
from .question import Question

Owe = Callable[[Charge | None], None]
"""Says what one request owes, as ``Question.owe`` does; the last word counts."""


class Tab:
    """One question's requests and what each of them owes.

    Args:
        question: owes the sum of all lines, at any time.
    """

    def __init__(self, question: Question) -> None:
        self._question = question
        self._lines: list[Charge | None] = []

    def __len__(self) -> int:
        """Requests so far."""
        return len(self._lines)

    def line(self) -> Owe:
        """A line for one more request, which owes nothing yet."""
        at = len(self._lines)
        self._lines.append(None)

        def owe(charge: Charge | None) -> None:
            self._lines[at] = charge
            self._question.owe(together([line for line in self._lines if line is not None]))

        return owe


def together(charges: Sequence[Charge]) -> Charge | None:
    """The sum; None where nothing is owed, dollars None where one of them is unknown."""
    if not charges:
        return None
    known = [charge.usd for charge in charges if charge.usd is not None]
    usd = sum(known, Decimal(0)) if len(known) == len(charges) else None
    return Charge(usd=usd, llm_tokens=sum(charge.llm_tokens for charge in charges))
