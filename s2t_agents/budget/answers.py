"""What a person may answer when a budget asks for more."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from s2t_agents.errors import BadLimit

_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_UNITS = ("usd", "escalations", "llm_tokens", "seconds")


def more_from(answer: Any, unit: str) -> dict[str, Any]:
    """The keywords for ``Budget.extend``; empty for a no.

    Args:
        answer: a mapping of units, a number or a text with one (of ``unit``), or False, None, 0 or "no...".
        unit: what ran out.

    Raises:
        BadLimit: a yes that does not say how much, or units nobody counts.
    """
    if isinstance(answer, Mapping):
        unknown = [key for key in answer if key not in _UNITS]
        if unknown:
            raise BadLimit(f"{unknown}: no such limit.", hint=f"Answer with {', '.join(_UNITS)}.")
        return {key: value for key, value in answer.items() if value}
    if not answer or (isinstance(answer, str) and answer.strip().lower().startswith(("n", "0"))):
        return {}
    if isinstance(answer, str) and (found := _NUMBER.search(answer)):
        answer = Decimal(found[0])
    if isinstance(answer, bool) or not isinstance(answer, int | float | Decimal):
        raise BadLimit(
            f"{answer!r} does not say how many more {unit}.", hint='Answer with a number, as "3 more", or no.'
        )
    if unit in ("escalations", "llm_tokens") and answer == int(answer):
        return {unit: int(answer)}
    return {unit: float(answer) if unit == "seconds" else answer}
