"""From a person's answer to the keywords of ``Budget.extend``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from ..errors import BadLimit
from .quantities import UNITS

_FIRST_WORD = re.compile(r"\W*([a-z]+)", re.IGNORECASE)
_NOES = frozenset({"no", "none", "nope", "never", "n"})
_FIGURE = re.compile(r"[-\N{MINUS SIGN}]?\$?[\d.,]*\d[\w%]*", re.ASCII)
_PLAIN = re.compile(r"(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?", re.ASCII)
_SCALED = re.compile(
    r"[€£¥₹¢]|\b(?:cents?|dozens?|hundred|thousand|million|mins?|minutes?|hours?|days?|eur|euros?|gbp|pounds?)\b",
    re.IGNORECASE,
)


def extension_from(answer: Any, unit: str) -> dict[str, Any]:
    """The keywords for ``Budget.extend``; empty for a no.

    Args:
        answer: a mapping of units; a number or a text with exactly one, in ``unit`` and no other (a point before
            decimals, commas only between thousands); or a no: False, None, 0, or a text that begins with "no" or
            a like word.
        unit: what ran out.

    Raises:
        BadLimit: a yes that does not say how much, or may mean something else, or units that are not counted.
    """
    if isinstance(answer, Mapping):
        unknown = [key for key in answer if key not in UNITS]
        if unknown:
            raise BadLimit(f"{unknown}: no such limit.", hint=f"Answer with {', '.join(UNITS)}.")
        return {key: value for key, value in answer.items() if value}
    number = _number_in(answer) if isinstance(answer, str) else answer or 0
    if isinstance(number, bool) or not isinstance(number, int | float | Decimal) or not math.isfinite(number):
        raise BadLimit(
            f"{answer!r} does not say how many more {unit}.",
            hint='Answer with one plain number, as "3 more" or "0.05", or no.',
        )
    if number == 0:
        return {}
    if unit not in ("usd", "seconds") and number == int(number):
        return {unit: int(number)}
    return {unit: float(number) if unit == "seconds" else number}


def _number_in(text: str) -> Decimal | None:
    """The only number of a text, 0 for a no; None where it is neither."""
    word = _FIRST_WORD.match(text)
    if not text.strip() or (word and word[1].lower() in _NOES):
        return Decimal(0)
    figures = [found.lstrip("$,").removesuffix("s") for found in _FIGURE.findall(text)]
    if len(figures) != 1 or not _PLAIN.fullmatch(figures[0]) or _SCALED.search(text):
        return None
    return Decimal(figures[0].replace(",", ""))
