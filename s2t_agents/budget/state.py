"""A budget at one moment, in public units and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from .quantities import LOCAL, UNITS, Counts, Limits, public

Number = Decimal | int | float


@dataclass(frozen=True, slots=True)
class BudgetState:
    """What one budget allows, holds, spent and has left. Units: USD, escalations, LLM tokens, answers,
    tokens of answers, seconds.

    Args:
        path: where in the tree, as ``fleet/run/agent``.
        limit: limited units only.
        held: reserved at this moment; limited units only.
        spent: settled, overrun included, also in units without a limit; ``usd`` is None once a cost of unknown price is
            among it. Answers and their tokens are counted, and shown, where something in the tree limits local work.
        left: ``limit - held - spent``, never below 0; limited units only. Parents may have less.
        kept: the part of ``left`` that only a last answer may use (finalization reserve).
        overrun: the part of ``spent`` that went over what was reserved for it.
        unpriced: how many settled costs had no known price.
        holds: how many reservations are open.
        window: the number of the window of time that ``spent`` belongs to, by the store's clock; 0 without windows.
    """

    path: str
    limit: dict[str, Number]
    held: dict[str, Number]
    spent: dict[str, Number | None]
    left: dict[str, Number]
    kept: dict[str, Number]
    overrun: dict[str, Number]
    unpriced: int
    holds: int
    window: int = 0

    def as_dict(self) -> dict[str, dict[str, int | float | str | None]]:
        """``{"limit": ..., "held": ..., "spent": ..., "left": ...}`` for JSON; dollars are exact strings."""
        parts: dict[str, dict[str, Number | None]] = {
            "limit": {**self.limit},
            "held": {**self.held},
            "spent": {**self.spent},
            "left": {**self.left},
        }
        return {part: {unit: _plain(v) for unit, v in values.items()} for part, values in parts.items()}


def _plain(value: Number | None) -> int | float | str | None:
    return f"{value:f}" if isinstance(value, Decimal) else value


def state_of(
    path: str, limits: Limits, keep: Counts, spent: Counts, held: Counts, over: Counts, holds: int, window: int
) -> BudgetState:
    """A meter's stored numbers in public units; ``spent.seconds`` is the time that has passed of a deadline."""
    limited = [(i, unit, total) for i, unit in enumerate(UNITS) if (total := limits[i]) is not None]
    used: dict[str, Number | None] = {
        unit: public(unit, spent[i])
        for i, unit in enumerate(UNITS)
        if limits[i] is not None or (unit != "seconds" and (spent[i] or unit not in LOCAL))
    }
    if spent.unpriced:
        used["usd"] = None
    return BudgetState(
        path=path,
        limit={unit: public(unit, total) for _, unit, total in limited},
        held={unit: public(unit, held[i]) for i, unit, _ in limited},
        spent=used,
        left={unit: public(unit, max(0, total - spent[i] - held[i])) for i, unit, total in limited},
        kept={unit: public(unit, keep[i]) for i, unit, _ in limited if keep[i]},
        overrun={unit: public(unit, over[i]) for i, unit in enumerate(UNITS) if over[i]},
        unpriced=spent.unpriced,
        holds=holds,
        window=window,
    )
