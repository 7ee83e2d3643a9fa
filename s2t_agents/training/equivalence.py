r"""Mathematical equivalence: ``\frac{1}{2}``, ``0.5`` and ``1/2`` are one answer.

The final expression of a text is found here; whether two expressions are equal is judged by the math-verify library,
in a process of its own (``math_judge``), because its own time limits work in a main thread only.
"""

from __future__ import annotations

import re
import threading
from importlib.util import find_spec

from ..errors import ConfigError
from ..fork_safety import renew_in_child
from .math_judge import shared_judge

LONGEST = 1000
"""Characters of an expression that is judged; longer ones are equal to themselves only."""

_MARK = re.compile(r"(?:answer is|answer:|####)[:\s]*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.(?:\s|$)|\n")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_NO_WORD = re.compile(r"\\(?:text|mathrm|mbox|begin|end|operatorname)\s*\{[^{}]*\}")
_LATEX = ("$", r"\(", r"\[")


class MathEquivalence:
    """Grades and votes by equivalence; safe to share between threads.

    Raises:
        ConfigError: math-verify is not installed.
    """

    def __init__(self) -> None:
        if find_spec("math_verify") is None:
            raise ConfigError(
                'grading = "math" needs the math-verify library.',
                hint="pip install 's2t-agents[train]', or use numeric grading.",
            )
        self._lock = threading.Lock()
        renew_in_child(self._renew)
        self._votes: dict[str, dict[str, str]] = {}  # by item: expression -> the first expression equal to it

    def _renew(self) -> None:
        self._lock = threading.Lock()  # what it guards is whole at any moment

    def gradable(self, answer: str) -> bool:
        """Any text: what is no mathematics is equal to itself only."""
        return True

    def right(self, text: str, answer: str) -> bool:
        """Whether the text's final expression equals the answer's.

        Raises:
            S2TError: the judging process cannot be started.
        """
        return equal(final_expression(answer) or as_math(answer), _said(text))

    def vote(self, item: str, text: str) -> str:
        """The first expression seen for this item that equals the text's own."""
        said = _said(text)
        with self._lock:
            known = self._votes.setdefault(item, {})
            if said not in known:
                known[said] = next((key for key in dict.fromkeys(known.values()) if equal(key, said)), said)
            return known[said]


def equal(gold: str, said: str) -> bool:
    """Whether two expressions are equal, as far as math-verify can tell within its time."""
    if not gold or not said:
        return False
    if gold == said:
        return True
    return max(len(gold), len(said)) <= LONGEST and shared_judge().equal(gold, said)


def final_expression(text: str) -> str | None:
    r"""The last ``\boxed{}``, else what follows the last "answer is", "answer:" or "####"; None without any."""
    inside = _boxed(text)
    if inside is not None:
        return as_math(inside)
    marks = list(_MARK.finditer(text))
    return as_math(_SENTENCE_END.split(text[marks[-1].end() :], maxsplit=1)[0]) if marks else None


def _said(text: str) -> str:
    """A whole text's final expression; where nothing marks it, its last line is read."""
    lines = text.strip().splitlines()
    return final_expression(text) or (as_math(lines[-1]) if lines else "")


def _boxed(text: str) -> str | None:
    """What stands in the last box whose braces match."""
    start = text.rfind("\\boxed{")
    depth = 0
    for at in range(start + len("\\boxed"), len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if not depth:
            return text[start + len("\\boxed{") : at]
    return None


def as_math(expression: str) -> str:
    """An expression as LaTeX between dollars; prose and what has its own delimiters stay as they are."""
    bare = expression.strip().strip("*").strip().rstrip(".").replace("\\$", "")
    if bare.count("$") % 2:  # a price, no delimiter
        bare = bare.replace("$", "")
    words = _WORD.findall(_NO_WORD.sub("", bare))
    return bare if not bare or len(words) > 1 or any(mark in bare for mark in _LATEX) else f"${bare}$"
