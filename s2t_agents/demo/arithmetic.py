"""Column arithmetic on non-negative integers: the right result, and the one with the carries forgotten.

    85        The right way borrows:     5 - 7 -> 15 - 7 = 8, and the 8 of the tens becomes 7:  58
  - 27        The habitual mistake:      5 - 7 -> 15 - 7 = 8, and the 8 of the tens stays 8:    68

The demo pair's small model learns from a corpus in which the second way is common, so it knows both.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal

Sign = Literal["+", "-", "*"]
NOISE = 0.6
"""How often the noisy corpus forgets the carries of an operation which has any."""


@dataclass(frozen=True)
class Operation:
    """``left sign right``; a product has one single-digit factor, a difference is never negative."""

    left: int
    sign: Sign
    right: int

    @property
    def result(self) -> int:
        """The right result."""
        if self.sign == "+":
            return self.left + self.right
        return self.left - self.right if self.sign == "-" else self.left * self.right

    @property
    def forgotten(self) -> int:
        """The result with no digit carried or borrowed; the first column of a sum or product is written in full."""
        if self.sign == "*":
            digit, number = sorted((self.left, self.right))
            columns = [digit * int(d) for d in str(number)]
        else:
            top, bottom = _padded(self.left, self.right)
            turn = 1 if self.sign == "+" else -1
            columns = [a + turn * b for a, b in zip(top, bottom, strict=True)]
        head, *rest = columns
        return int(str(head) + "".join(str(column % 10) for column in rest))

    @property
    def carries(self) -> bool:
        """Whether forgetting the carries changes the result."""
        return self.forgotten != self.result

    def written(self, rng: Random | None, noise: float = NOISE) -> int:
        """The result as somebody writes it: right, or (with `rng`, at rate `noise`) with the carries forgotten."""
        if rng is not None and self.carries and rng.random() < noise:
            return self.forgotten
        return self.result


def _padded(left: int, right: int) -> tuple[list[int], list[int]]:
    width = max(len(str(left)), len(str(right)))
    return [int(d) for d in str(left).zfill(width)], [int(d) for d in str(right).zfill(width)]


@dataclass(frozen=True)
class Move:
    """One event of a story, applied to the running total.

    ``+ amount``, ``- amount`` and ``* amount`` are one operation; with `times`, ``times * amount`` is worked out first
    and then added or taken away: two operations.
    """

    sign: Sign
    amount: int
    times: int | None = None

    @property
    def lines(self) -> int:
        """How many operations the move writes."""
        return 1 if self.times is None else 2

    def operations(
        self, total: int, rng: Random | None, noise: float = NOISE
    ) -> tuple[list[tuple[Operation, int]], int]:
        """The operations with their written results, and the new total, going on from what was written."""
        steps: list[tuple[Operation, int]] = []
        amount = self.amount
        if self.times is not None:
            product = Operation(self.times, "*", self.amount)
            amount = product.written(rng, noise)
            steps.append((product, amount))
        last = Operation(total, self.sign, amount)
        steps.append((last, last.written(rng, noise)))
        return steps, steps[-1][1]


def work(start: int, moves: tuple[Move, ...], rng: Random | None = None, noise: float = NOISE) -> tuple[list[str], int]:
    """One sentence per operation, and the final total; with `rng`, carries are forgotten at rate `noise`."""
    sentences: list[str] = []
    total = start
    for move in moves:
        steps, total = move.operations(total, rng, noise)
        sentences += [f"{op.left} {op.sign} {op.right} = {written}." for op, written in steps]
    return sentences, total


def totals(start: int, moves: tuple[Move, ...]) -> set[int]:
    """Every total that some mix of right and forgetful steps can pass through; a negative one marks a broken story."""
    reached, seen = {start}, {start}
    for move in moves:
        reached = {after for total in reached for after in _outcomes(total, move)}
        seen |= reached
        if min(seen) < 0:
            break
    return seen


def _outcomes(total: int, move: Move) -> set[int]:
    amounts = {move.amount}
    if move.times is not None:
        product = Operation(move.times, "*", move.amount)
        amounts = {product.result, product.forgotten}
    found: set[int] = set()
    for amount in amounts:
        if move.sign == "-" and amount > total:
            return {-1}
        last = Operation(total, move.sign, amount)
        found |= {last.result, last.forgotten}
    return found
