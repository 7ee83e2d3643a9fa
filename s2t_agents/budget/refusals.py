"""The text of a refusal: the error, and the question to a person who may allow more."""

from __future__ import annotations

from decimal import Decimal

from ..errors import BudgetExceeded
from .quantities import LOCAL, public
from .store import Refusal
from .terms import OnExhausted

_ONE = {
    "usd": "USD",
    "escalations": "escalation",
    "llm_tokens": "LLM token",
    "answers": "answer",
    "answer_tokens": "answer token",
    "seconds": "second",
}
_MANY = {unit: one if unit == "usd" else f"{one}s" for unit, one in _ONE.items()}


def _way_out(unit: str, on_exhausted: OnExhausted) -> str:
    if on_exhausted == "ask":
        return ", or give the agent a BudgetMiddleware, which asks for it"
    if unit == "answer_tokens":
        return ", or ask for shorter answers (max_tokens): what answers at work may need is held"
    local = unit in LOCAL or unit == "seconds"
    return ', or answer locally (on_exhausted="degrade")' if on_exhausted == "raise" and not local else ""


def budget_exceeded(refused: Refusal, on_exhausted: OnExhausted) -> BudgetExceeded:
    """A store's refusal in public units.

    Args:
        refused: in stored numbers.
        on_exhausted: of the budget that was asked, for the way out.
    """
    unit = refused.unit
    limit, spent, held, wanted, kept = (public(unit, value) for value in refused[2:])
    if unit == "seconds":
        message = f"Budget {refused.path!r}: its {_counted(limit, unit)} are over ({spent:.1f} s have passed)."
    else:
        back = f", kept for a last answer {written_out(kept)}" if kept else ""
        message = (
            f"Budget {refused.path!r} cannot hold {_counted(wanted, unit)}: "
            f"limit {written_out(limit)}, spent {written_out(spent)}, held {written_out(held)}{back}."
        )
    return BudgetExceeded(
        message,
        unit=unit,
        limit=limit,
        spent=spent,
        held=held,
        wanted=wanted,
        budget=refused.path,
        hint=f"Allow more with extend({unit}=...){_way_out(unit, on_exhausted)}.",
    )


def refusal_question(refused: BudgetExceeded) -> str:
    """The question to a person who may allow more."""
    limit = _counted(refused.limit, refused.unit)
    if refused.unit == "seconds":
        return f"The budget {refused.budget!r} has used up its {limit}. Allow more?"
    held = f" (and holds {written_out(refused.held)})" if refused.held else ""
    wants = "" if refused.spent == refused.limit else f" and now wants {written_out(refused.wanted)}"
    return f"The budget {refused.budget!r} has used {written_out(refused.spent)} of {limit}{held}{wants}. Allow more?"


def _counted(value: object, unit: str) -> str:
    return f"{written_out(value)} {_ONE[unit] if value == 1 else _MANY[unit]}"


def written_out(value: object) -> str:
    """An amount as people, and models, read it: without an exponent."""
    if isinstance(value, float):
        return f"{value:.6f}".rstrip("0").rstrip(".")
    return f"{value:f}" if isinstance(value, Decimal) else str(value)
