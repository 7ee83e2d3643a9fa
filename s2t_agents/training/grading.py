"""When is a text the right answer? Three graders: exact text, the final number, mathematical equivalence."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

from ..errors import ConfigError

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_MARKED = re.compile(r"(?:answer is|####|\\boxed\{)\s*\$?(-?\d[\d,]*(?:\.\d+)?)", re.IGNORECASE)


def final_number(text: str) -> Decimal | None:
    """The number after the last "answer is", "####" or "\\boxed{", else the last number; None without any."""
    found = _MARKED.findall(text) or _NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None


def final_answer(text: str) -> str:
    """The final number in one form (``42.0`` and ``42`` are the same), else the whole text."""
    number = final_number(text)
    return text.strip() if number is None else f"{number.normalize():f}"


def exact(text: str, answer: str) -> bool:
    """The same text, apart from white space at the ends."""
    return text.strip() == answer.strip()


def numeric(text: str, answer: str) -> bool:
    """The same final number."""
    number = final_number(text)
    return number is not None and number == final_number(answer)


def math(text: str, answer: str) -> bool:
    """Mathematically equal, as the math-verify library judges.

    Raises:
        ConfigError: the library is not installed.
    """
    try:
        from math_verify import parse, verify  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ConfigError(
            'grading = "math" needs the math-verify library.', hint="pip install math-verify, or use numeric grading."
        ) from error
    return bool(verify(parse(answer), parse(text)))


GRADERS: dict[str, Callable[[str, str], bool]] = {"exact": exact, "numeric": numeric, "math": math}
