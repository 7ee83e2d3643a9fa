"""When is a text the right answer? Three graders: exact text, the final number, mathematical equivalence."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Protocol

from .equivalence import MathEquivalence

_NUMBER = r"-?\$?(?:\d[\d,]*(?:\.\d+)?|(?<!\w)\.\d+)(?:e[-+]?\d{1,3}(?!\d))?"  # longer exponents are no answers
_MARK = r"(?:answer is|####|\\boxed\{)[:\s*$\\]*"
_ANY = re.compile(_NUMBER, re.IGNORECASE)
_MARKED = re.compile(f"{_MARK}({_NUMBER})", re.IGNORECASE)
_GOLD = re.compile(rf"(?:.*{_MARK})?\s*\$?{_NUMBER}[\s*$%}}\\]*\.?\s*", re.IGNORECASE | re.DOTALL)


class Grader(Protocol):
    """Judges the texts of one task."""

    def gradable(self, answer: str) -> bool:
        """Whether texts can be judged against this answer at all."""
        ...

    def right(self, text: str, answer: str) -> bool:
        """Whether a whole text gives this answer."""
        ...

    def vote(self, item: str, text: str) -> str:
        """The text's answer to the item of this id, in a form in which equal answers are equal strings."""
        ...


class Exact:
    """The same text, apart from white space at the ends."""

    def gradable(self, answer: str) -> bool:
        """Any text."""
        return True

    def right(self, text: str, answer: str) -> bool:
        """The same text, apart from white space at the ends."""
        return text.strip() == answer.strip()

    def vote(self, item: str, text: str) -> str:
        """The text."""
        return text.strip()


class Numeric:
    """The same final number."""

    def gradable(self, answer: str) -> bool:
        """One plain number, alone or after a mark at the end of a text."""
        return _GOLD.fullmatch(_plain(answer)) is not None

    def right(self, text: str, answer: str) -> bool:
        """The same final number."""
        number = final_number(text)
        return number is not None and number == final_number(answer)

    def vote(self, item: str, text: str) -> str:
        """See ``final_answer``."""
        return final_answer(text)


def final_number(text: str) -> Decimal | None:
    """The number after the last "answer is", "####" or "\\boxed{", else the last number; None without any."""
    plain = _plain(text)
    found = _MARKED.findall(plain) or _ANY.findall(plain)
    try:
        return Decimal(re.sub("[$,]", "", found[-1])) if found else None
    except InvalidOperation:
        return None


def _plain(text: str) -> str:
    """With the typographic minus sign (U+2212) as the one that numbers are read with."""
    return text.replace("\u2212", "-")


def final_answer(text: str) -> str:
    """The final number in one form (``42.0`` and ``42`` are the same), else the whole text."""
    number = final_number(text)
    return text.strip() if number is None else f"{number.normalize():f}"


GRADERS: dict[str, Callable[[], Grader]] = {"exact": Exact, "numeric": Numeric, "math": MathEquivalence}
