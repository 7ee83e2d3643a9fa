"""The loss mask of wrong results: read as context, never a target.

    134 + 616 = 740.     right: 750
                 ^       the first wrong digit has no weight; what follows it has

The large model's own corpus has no wrong results, but it reads the small one's answers. Without such context in
training its distribution after the first digit of a wrong result is arbitrary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from s2t_agents.demo.arithmetic import Operation

WORKED = re.compile(r"(\d+) ([+*-]) (\d+) = (\d+)")


def first_wrong(text: str) -> list[int]:
    """Where each wrong result in ``text`` leaves the right one: one character position per wrong result.

    A result that ends too early leaves it at the character behind its end.
    """
    found = []
    for match in WORKED.finditer(text):
        left, sign, right, written = match.groups()
        wanted = str(Operation(int(left), sign, int(right)).result)  # type: ignore[arg-type]
        if written != wanted:
            same = next((at for at, (a, b) in enumerate(zip(written, wanted, strict=False)) if a != b), None)
            found.append(match.start(4) + (min(len(written), len(wanted)) if same is None else same))
    return found


def masked(weights: Sequence[float], text: str, offsets: Sequence[tuple[int, int]]) -> list[float]:
    """The loss weights with those of the tokens at which a wrong result begins set to 0.

    Args:
        weights: one per token.
        text: what was tokenized.
        offsets: first and last character (exclusive) of every token.
    """
    wrong = first_wrong(text)
    return [
        0.0 if any(start <= at < end for at in wrong) else weight
        for weight, (start, end) in zip(weights, offsets, strict=True)
    ]
