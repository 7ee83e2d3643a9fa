"""When is a text the right answer? Three graders: exact text, the final number, mathematical equivalence."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Protocol

from .equivalence import MathEquivalence

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_MARKED = re.compile(r"(?:answer is|####|\\boxed\{)\s*\$?(-?\d[\d,]*(?:\.\d+)?)", re.IGNORECASE)


class Grader(Protocol):
    """Judges the texts of one task."""

    def right(self, text: str, answer: str) -> bool:
        """Whether a whole text gives this answer."""
        ...

    def vote(self, item: str, text: str) -> str:
        """The text's answer to the item of this id, in a form in which equal answers are equal strings."""
        ...


class Exact:
    """The same text, apart from white space at the ends."""

    def right(self, text: str, answer: str) -> bool:
        """See ``exact``."""
        return exact(text, answer)

    def vote(self, item: str, text: str) -> str:
        """The text."""
        return text.strip()


class Numeric:
    """The same final number."""

    def right(self, text: str, answer: str) -> bool:
        """See ``numeric``."""
        return numeric(text, answer)

    def vote(self, item: str, text: str) -> str:
        """See ``final_answer``."""
        return final_answer(text)


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


GRADERS: dict[str, Callable[[], Grader]] = {"exact": Exact, "numeric": Numeric, "math": MathEquivalence}
