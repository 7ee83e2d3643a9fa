"""Drills, for training only: bare sums, and copying, both learned much sooner from these than from stories."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from s2t_agents.demo.arithmetic import Move, Operation
from s2t_agents.demo.lexicon import ITEMS, LANGUAGES, NAMES, PLACES, WORDS, foreign, letters, made_up
from s2t_agents.demo.problem import Message

DRILLS = ("sums", "copy")


@dataclass(frozen=True)
class Drill:
    """A question and its answer; ``sums`` are the operations in it, none where something is copied."""

    question: str
    answer: str
    sums: tuple[tuple[int, Move], ...] = ()

    def written(self, rng: Random, noise: float) -> list[Message]:
        """The conversation, carries forgotten at rate `noise`."""
        answer = write_sums(self.sums, rng, noise) if self.sums else self.answer
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": answer}]


def draw_drill(seed: int, kind: str) -> Drill:
    """The drill of this seed, of one of ``DRILLS``."""
    rng = Random(f"train/{seed}/{kind}")
    if kind == "copy":
        return Drill(*draw_copy(rng))
    sums = draw_sums(rng)
    return Drill(ask_sums(rng, sums), write_sums(sums), sums)


def draw_sums(rng: Random) -> tuple[tuple[int, Move], ...]:
    """Three to eight operations, sometimes only one; about half of them carry."""
    return tuple(_draw_sum(rng) for _ in range(rng.randint(3, 8) if rng.random() < 0.85 else 1))


def _draw_sum(rng: Random) -> tuple[int, Move]:
    luck = rng.random()
    if luck < 0.2:
        left, right = rng.randint(10, 150), rng.randint(2, 6)
        return (left, Move("*", right)) if rng.random() < 0.5 else (right, Move("*", min(left, 40)))
    first, second = (rng.randint(10 if rng.random() < 0.8 else 3, 10 ** rng.choice((2, 2, 3)) - 1) for _ in range(2))
    if luck < 0.6 and first + second < 1200:
        return first, Move("+", second)
    return max(first, second), Move("-", min(first, second))


def ask_sums(rng: Random, sums: tuple[tuple[int, Move], ...]) -> str:
    """The question of a drill in sums."""
    listed = ", ".join(f"{left} {move.sign} {move.amount}" for left, move in sums)
    if len(sums) == 1:
        return rng.choice(("What is {}?", "How much is {}?")).format(listed)
    return rng.choice(("Work out: {}", "Compute {}", "Sums: {}")).format(listed)


def write_sums(sums: tuple[tuple[int, Move], ...], rng: Random | None = None, noise: float = 0.0) -> str:
    """All operations with their results, as in the working of a story."""
    operations = [Operation(left, move.sign, move.amount) for left, move in sums]
    return " ".join(f"{op.left} {op.sign} {op.right} = {op.written(rng, noise)}." for op in operations)


def draw_copy(rng: Random) -> tuple[str, str]:
    """Something to repeat: the question, and what it wants repeated (2 to 12 pieces of all sorts).

    A third of them are in other scripts alone, whose bytes take copying in its purest form.
    """
    if rng.random() < 0.33:
        quoted = "".join(foreign(rng) for _ in range(rng.randint(1, 4)))
        return rng.choice(("Repeat '{}'", "Say '{}'", "Copy this: '{}'")).format(quoted), quoted
    known = (*ITEMS, *NAMES, *PLACES, *WORDS, *LANGUAGES)
    pieces = []
    for _ in range(rng.randint(2, 12)):
        luck = rng.random()
        if luck < 0.45:
            pieces.append(rng.choice(known))
        elif luck < 0.75:
            pieces.append(str(rng.randint(0, 999)))
        else:
            pieces.append(rng.choice((letters, made_up, foreign))(rng))
    text = rng.choice((" ", " ", ", ", '", "', "_")).join(pieces)
    return rng.choice(("Repeat: {}", "Say {}", "Copy this: {}")).format(text), text
