"""What a reservation wants and what was really used."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from s2t_agents.budget import money
from s2t_agents.types import Charge

UNITS = ("usd", "escalations", "llm_tokens")

Units = tuple[int, int, int, int]
"""(pico-dollars, escalations, LLM tokens, amounts of unknown price): an :class:`Amount` as a store adds it."""

NOTHING: Units = (0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Amount:
    """A cost, estimated or real. ``a + b`` adds; an unknown price makes the sum's price unknown.

    Args:
        usd: US dollars; ``None`` means the price is unknown, which a dollar limit refuses. Free is ``0``.
        escalations: questions put to the LLM.
        llm_tokens: tokens the LLM reads and writes.

    Raises:
        BadLimit: negative, NaN, infinite or fractional where whole numbers are counted.
    """

    usd: Decimal | None = None
    escalations: int = 0
    llm_tokens: int = 0

    def __post_init__(self) -> None:
        if self.usd is not None:
            object.__setattr__(self, "usd", money.dollars(self.usd, "Amount.usd"))
        money.count(self.escalations, "Amount.escalations")
        money.count(self.llm_tokens, "Amount.llm_tokens")

    @classmethod
    def of(cls, charge: Charge) -> Amount:
        """What one escalation holds or costs, as budgets and ledgers count it.

        Raises:
            BadLimit: negative, or more than any budget can count.
        """
        amount = cls(usd=charge.usd, escalations=1, llm_tokens=charge.llm_tokens)
        amount.units()  # raises what a store would raise later
        return amount

    def __add__(self, other: Amount) -> Amount:
        unknown = self.usd is None or other.usd is None
        return Amount(
            None if unknown else money.add(self.usd or Decimal(0), other.usd or Decimal(0)),
            self.escalations + other.escalations,
            self.llm_tokens + other.llm_tokens,
        )

    def __radd__(self, other: Any) -> Amount:
        """Lets ``sum(amounts)`` start from 0."""
        return self if other == 0 else NotImplemented

    def units(self) -> Units:
        """As whole numbers; a fraction of a pico-dollar counts as a whole one."""
        if self.usd is None:
            return (0, self.escalations, self.llm_tokens, 1)
        return (money.pico(self.usd), self.escalations, self.llm_tokens, 0)


def plus(a: Units, b: Units) -> Units:
    """``a + b``, unit by unit."""
    return (a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3])


def minus(a: Units, b: Units) -> Units:
    """``a - b``, unit by unit."""
    return (a[0] - b[0], a[1] - b[1], a[2] - b[2], a[3] - b[3])


def excess(actual: Units, reserved: Units) -> Units:
    """How far each unit went over what was reserved, never below 0."""
    return (
        max(0, actual[0] - reserved[0]),
        max(0, actual[1] - reserved[1]),
        max(0, actual[2] - reserved[2]),
        0,
    )


def shown(unit: str, value: int) -> Decimal | int:
    """A stored number in its public unit."""
    return money.usd(value) if unit == "usd" else value
