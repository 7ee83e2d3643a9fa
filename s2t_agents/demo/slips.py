"""Slips that are read and not learnt: a forgotten carry stands in the text, but nothing rewards writing it.

    134 + 616 = 740.     right: 750
                 ^       the first wrong digit has no weight; what follows it has

The large model never slips itself, but it reads the small one's answers. Without this it has never seen a wrong result,
and after the first digit of one it says anything at all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from s2t_agents.demo.arithmetic import Operation

WORKED = re.compile(r"(\d+) ([+*-]) (\d+) = (\d+)")


def first_wrong(text: str) -> list[int]:
    """Where each wrong result in ``text`` leaves the right one: one character position per slip.

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


def without_slips(weights: Sequence[float], text: str, offsets: Sequence[tuple[int, int]]) -> list[float]:
    """The loss weights with those of the tokens at which a slip begins set to 0.

    Args:
        weights: one per token.
        text: what was tokenized.
        offsets: first and last character (exclusive) of every token.
    """
    slips = first_wrong(text)
    return [
        0.0 if any(start <= at < end for at in slips) else weight
        for weight, (start, end) in zip(weights, offsets, strict=True)
    ]
