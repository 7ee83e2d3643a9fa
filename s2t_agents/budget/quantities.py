"""The quantities that budgets count, as the whole numbers that stores add and compare."""

from __future__ import annotations

from decimal import Decimal
from typing import Generic, NamedTuple, TypeVar

from ..errors import BadLimit
from ..types import Charge
from . import money

N = TypeVar("N", int, int | None)

COUNTED = ("usd", "escalations", "llm_tokens", "answers", "answer_tokens")
"""What charges are counted in."""
LOCAL = ("answers", "answer_tokens")
"""The work of the local model; the others count what the LLM is asked."""
UNITS = (*COUNTED, "seconds")


class Quantities(NamedTuple, Generic[N]):
    """One number for each unit. Limits, holds, costs, overruns and finalization reserves all have this form.

    Attributes:
        usd: whole pico-dollars (1e-12 USD).
        escalations: questions to the LLM.
        llm_tokens: tokens that the LLM reads and writes.
        answers: answers of the local model.
        answer_tokens: tokens that the local model generates.
        seconds: whole microseconds; a limit is a deadline, holds and costs have none.
        unpriced: charges of unknown price, whose dollars are not in ``usd``.
    """

    usd: N
    escalations: N
    llm_tokens: N
    answers: N
    answer_tokens: N
    seconds: N
    unpriced: N


Counts = Quantities[int]
Limits = Quantities[int | None]
"""``None`` is no limit."""

NOTHING: Counts = Quantities(0, 0, 0, 0, 0, 0, 0)
UNLIMITED: Limits = Quantities(None, None, None, None, None, None, None)

MAX_SECONDS = 10 * 365 * 86_400
LARGEST_LIMIT: Counts = Quantities(money.pico(money.MAX_USD), *(money.MAX_COUNT,) * 4, MAX_SECONDS * 1_000_000, 0)
"""What a limit may be, raised or not."""
LARGEST_TOTAL: Counts = Quantities(9 * 10**18, *(9 * 10**15,) * 4, 0, 9 * 10**15)
"""What one meter adds up: it fits SQLite's 64-bit integers, and the doubles of the scripts that Redis runs."""

_new = tuple.__new__  # a reservation makes several, and this takes half the time of Quantities(...)


def quantities_of(charge: Charge) -> Counts:
    """A charge in whole numbers; a fraction of a pico-dollar counts as a whole one.

    Raises:
        BadLimit: no charge; or a part of it is negative, NaN, infinite, no whole number, or more than can be counted.
    """
    if not isinstance(charge, Charge):
        raise BadLimit(f"{charge!r} is not a Charge.", hint="Give Charge(usd, llm_tokens), for one escalation.")
    escalations = money.count(charge.escalations, "Charge.escalations")
    llm_tokens = money.count(charge.llm_tokens, "Charge.llm_tokens")
    answers = money.count(charge.answers, "Charge.answers")
    answer_tokens = money.count(charge.answer_tokens, "Charge.answer_tokens")
    if charge.usd is None:
        return _new(Quantities, (0, escalations, llm_tokens, answers, answer_tokens, 0, 1))
    usd = money.pico(money.dollars(charge.usd, "Charge.usd"))
    return _new(Quantities, (usd, escalations, llm_tokens, answers, answer_tokens, 0, 0))


def charge_of(total: Counts) -> Charge:
    """Counts as a charge; its dollars are unknown if any part of them is."""
    usd = None if total.unpriced else money.usd(total.usd)
    return Charge(usd, total.llm_tokens, total.escalations, total.answers, total.answer_tokens)


def plus(a: Counts, b: Counts) -> Counts:
    """``a + b``, unit by unit."""
    return _new(
        Quantities,
        (a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4], a[5] + b[5], a[6] + b[6]),
    )


def minus(a: Counts, b: Counts) -> Counts:
    """``a - b``, unit by unit."""
    return _new(
        Quantities,
        (a[0] - b[0], a[1] - b[1], a[2] - b[2], a[3] - b[3], a[4] - b[4], a[5] - b[5], a[6] - b[6]),
    )


def excess(actual: Counts, reserved: Counts) -> Counts:
    """How far each unit went over what was reserved, never below 0."""
    over = [max(0, used - held) for used, held in zip(actual[:5], reserved[:5], strict=True)]
    return Quantities._make((*over, 0, 0))


def raised(limits: Limits, by: Counts) -> Limits:
    """Limits with so much more; a unit without a limit stays without.

    Raises:
        BadLimit: as :func:`check_limits`.
    """
    more = Quantities(*(None if limit is None else limit + more for limit, more in zip(limits, by, strict=True)))
    check_limits(more)
    return more


def check_limits(limits: Limits) -> None:
    """Refuse raised limits that no budget may be opened with.

    Raises:
        BadLimit: naming the limit, and the largest.
    """
    for unit, limit, largest in zip(UNITS, limits, LARGEST_LIMIT, strict=False):
        if limit is not None and limit > largest:
            raise BadLimit(
                f"The limit in {unit} would be {public(unit, limit):,}, above {public(unit, largest):,}.",
                hint="Raise it by less, or open a budget without this limit.",
            )


def check_total(total: Counts) -> None:
    """Refuse to hold or book what would make a meter's sum more than it can count.

    Raises:
        BadLimit: naming the sum, and the largest.
    """
    for unit, number, largest in zip((*UNITS, "charges of unknown price"), total, LARGEST_TOTAL, strict=True):
        if number > largest:
            raise BadLimit(
                f"The sum in {unit} would be {public(unit, number):,}, above the {public(unit, largest):,} that one "
                "budget counts.",
                hint="Open a budget of another name.",
            )


def public(unit: str, value: int) -> Decimal | int | float:
    """A stored number in its public unit: USD as Decimal, seconds as float, counts as they are."""
    if unit == "usd":
        return money.usd(value)
    return value / 1e6 if unit == "seconds" else value
