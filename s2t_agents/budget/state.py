"""A budget at one moment, for people and for JSON."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from s2t_agents.budget.amount import UNITS, shown
from s2t_agents.budget.store import Reading

Number = Decimal | int | float


@dataclass(frozen=True, slots=True)
class BudgetState:
    """What one budget allows, holds, spent and has left. Units: USD, escalations, LLM tokens, seconds.

    Args:
        path: where in the tree, as ``fleet/run/agent``.
        limit: limited units only.
        held: reserved at this moment, by anybody; limited units only.
        spent: settled, in every unit, overrun included; ``usd`` is None once a cost of unknown price is among it.
        left: ``limit - held - spent``, never below 0; limited units only. Parents may have less.
        kept: the part of ``left`` that only a last answer may use (finalization reserve).
        overrun: the part of ``spent`` that went over what was reserved for it.
        unpriced: how many settled costs had no known price.
        holds: how many reservations are open.
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


def state_of(path: str, now: Reading) -> BudgetState:
    """A store's reading in public units."""
    limited = [(i, unit, total) for i, unit in enumerate(UNITS) if (total := now.limits[i]) is not None]
    limit: dict[str, Number] = {unit: shown(unit, total) for _, unit, total in limited}
    held: dict[str, Number] = {unit: shown(unit, now.held[i]) for i, unit, _ in limited}
    spent: dict[str, Number | None] = {unit: shown(unit, now.spent[i]) for i, unit in enumerate(UNITS)}
    left: dict[str, Number] = {
        unit: shown(unit, max(0, total - now.spent[i] - now.held[i])) for i, unit, total in limited
    }
    if now.spent[3]:
        spent["usd"] = None
    if now.micros is not None and now.micros_left is not None:
        limit["seconds"], held["seconds"], left["seconds"] = now.micros / 1e6, 0.0, now.micros_left / 1e6
        spent["seconds"] = (now.micros - now.micros_left) / 1e6
    return BudgetState(
        path=path,
        limit=limit,
        held=held,
        spent=spent,
        left=left,
        kept={unit: shown(unit, now.keep[i]) for i, unit, _ in limited if now.keep[i]},
        overrun={unit: shown(unit, now.over[i]) for i, unit in enumerate(UNITS) if now.over[i]},
        unpriced=now.spent[3],
        holds=now.holds,
    )
