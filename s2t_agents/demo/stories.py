"""Word problems: somebody has some things, things come and go, how many are there at the end?

The numbers are drawn so that a step carries or borrows with probability `CARRY`, and so that the story also holds when
earlier steps went wrong (no total ever turns negative): a model's mistakes stay local.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from .arithmetic import Move, Sign, totals
from .lexicon import ITEMS, NAMES, PLACES

CARRY = 0.3
"""Share of steps which carry or borrow; low enough that forgetting every carry still solves many problems."""


@dataclass(frozen=True)
class Telling:
    """The sentences of one split: `{n}` a number, `{k}` a small factor, `{i}` the items, `{p}` the person."""

    start: tuple[str, ...]
    add: tuple[str, ...]
    take: tuple[str, ...]
    add_groups: tuple[str, ...]
    take_groups: tuple[str, ...]
    times: tuple[str, ...]
    ask: tuple[str, ...]


USUAL = Telling(
    start=(
        "{p} has {n} {i}.",
        "{p} starts with {n} {i}.",
        "There are {n} {i} in the shop of {p}.",
        "{p} owns {n} {i}.",
        "In {c}, {p} keeps {n} {i}.",
        "{p} counts {n} {i} at home.",
    ),
    add=(
        "{p} buys {n} more.",
        "Then {n} more arrive.",
        "{q} brings {n} more.",
        "{p} finds {n} others.",
        "{p} gets {n} from {q}.",
        "Another {n} are added.",
    ),
    take=(
        "{p} gives {n} to {q}.",
        "{p} sells {n} of them.",
        "Then {n} are lost.",
        "{q} takes {n} away.",
        "{n} of them break.",
        "{p} sends {n} to {c}.",
    ),
    add_groups=(
        "{p} buys {k} boxes of {n}.",
        "Then {k} bags with {n} each arrive.",
        "{q} brings {k} packs of {n}.",
    ),
    take_groups=(
        "{p} gives {n} to each of {k} friends.",
        "{p} sells {k} boxes of {n}.",
        "Then {k} bags of {n} are lost.",
    ),
    times=(
        "Then the number grows {k} times.",
        "After a year there are {k} times as many.",
        "{p} makes it {k} times as many.",
    ),
    ask=(
        "How many {i} are there now?",
        "How many {i} does {p} have now?",
        "How many {i} are left?",
        "How many {i} is that in the end?",
    ),
)
UNSEEN = Telling(
    start=("On the first day {p} puts {n} {i} on the table.", "A box of {p} holds {n} {i}."),
    add=("In the evening {q} adds {n} to them.", "{n} new ones come from {c}."),
    take=("A storm carries {n} off.", "{q} asks for {n} and gets them."),
    add_groups=("{q} comes with {k} cups, {n} in each.",),
    take_groups=("{k} friends each take {n} home.",),
    times=("By magic each turns into {k}.",),
    ask=("Tell me how many {i} that makes.", "What is the number of {i} at the end?"),
)


@dataclass(frozen=True)
class Size:
    """How large the problems of a split are: lines of working, and the largest total."""

    lines: tuple[int, int]
    top: int
    low: int


NORMAL = Size(lines=(2, 4), top=999, low=0)
LONGER = replace(NORMAL, lines=(5, 7))
LARGER = replace(NORMAL, top=1999, low=100)
LARGE = replace(LONGER, top=LARGER.top, low=LARGER.low)


def draw_moves(rng: Random, size: Size) -> tuple[int, tuple[Move, ...]]:
    """A start and the moves from there, 2 to 4 lines of working (more in the large size)."""
    while True:
        start = rng.randint(max(10, size.low), min(size.top, 999) if rng.random() < 0.4 else 99 + size.low)
        moves = _try_moves(rng, size, start)
        if moves is not None:
            return start, moves


def _try_moves(rng: Random, size: Size, start: int) -> tuple[Move, ...] | None:
    lines, total = rng.randint(*size.lines), start
    moves: list[Move] = []
    while lines:
        move = _draw_move(rng, size, total, carry=rng.random() < CARRY, lines=lines)
        if move is None:
            return None
        moves.append(move)
        lines -= move.lines
        total = move.operations(total, None)[1]
        if total > size.top:
            return None
    seen = totals(start, tuple(moves))
    return tuple(moves) if min(seen) >= 0 and max(seen) <= size.top + 200 else None


def _draw_move(rng: Random, size: Size, total: int, *, carry: bool, lines: int) -> Move | None:
    """One move whose first carrying step is as wished; None when the numbers at hand do not allow it."""
    for _ in range(60):
        sign: Sign = "+" if rng.random() < 0.5 else "-"
        if lines >= 2 and rng.random() < 0.3:
            move = Move(sign, rng.randint(2, 30 if rng.random() < 0.5 else 12), rng.randint(2, 6))
        elif total <= 150 and rng.random() < 0.12:
            move = Move("*", rng.randint(2, 5))
        else:
            limit = total if sign == "-" else size.top - total
            if limit < 2:
                continue
            move = Move(sign, rng.randint(2, min(limit, 99 if rng.random() < 0.7 else 899)))
        if move.sign == "-" and move.amount * (move.times or 1) > total:
            continue
        steps, _after = move.operations(total, None)
        if any(op.carries for op, _ in steps) == carry:
            return move
    return None


def tell_moves(rng: Random, telling: Telling, moves: tuple[Move, ...], names: dict[str, str]) -> list[str]:
    """One sentence per move."""
    sentences = []
    for move in moves:
        if move.sign == "*":
            forms = telling.times
        elif move.times is None:
            forms = telling.add if move.sign == "+" else telling.take
        else:
            forms = telling.add_groups if move.sign == "+" else telling.take_groups
        k = move.amount if move.sign == "*" else move.times
        sentences.append(rng.choice(forms).format(n=move.amount, k=k, **names))
    return sentences


def cast(rng: Random) -> dict[str, str]:
    """Who and what a story is about: person `p`, other person `q`, items `i`, city `c`."""
    person, other = rng.sample(NAMES, 2)
    return {"p": person, "q": other, "i": rng.choice(ITEMS), "c": rng.choice(PLACES)}


def draw_story(rng: Random, telling: Telling, size: Size) -> tuple[str, int, tuple[Move, ...]]:
    """A whole word problem: its text, start and moves."""
    start, moves = draw_moves(rng, size)
    names = cast(rng)
    told = [rng.choice(telling.start).format(n=start, **names), *tell_moves(rng, telling, moves, names)]
    return " ".join([*told, rng.choice(telling.ask).format(**names)]), start, moves
