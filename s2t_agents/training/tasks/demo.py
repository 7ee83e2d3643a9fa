"""Problems of the demo world."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ...demo.problem import Kind, Split, grade
from ...demo.world import generate
from ..grading import final_answer
from .items import Item, Task


class DemoTask:
    """Problems of the demo world: the loop runs their tools as an agent would.

    Args:
        split: see ``demo.world``; the splits share no problem.
        first: seed of the first problem; problems are those of ``first .. first + count - 1``.
        count: how many.
        kinds: taken in turn; empty for the world's own mix of word and tool problems.
    """

    def __init__(self, split: Split, first: int, count: int, kinds: Sequence[Kind]) -> None:
        self.name = f"demo/{split}"
        choices: Sequence[Kind | None] = kinds or (None,)
        problems = [generate(first + at, split, choices[at % len(choices)]) for at in range(count)]
        self.items: Sequence[Item] = [
            Item(name, problem.prompt, problem.tools, problem, identity=name)  # small talk repeats across seeds
            for problem in problems
            for name in [f"{split}-{problem.kind}-{problem.seed}"]
        ]

    def call(self, item: Item, name: str, arguments: Mapping[str, Any]) -> str:
        """The problem's own tool result, or its error."""
        result: str = item.source.call(name, arguments)
        return result

    def grade(self, item: Item, text: str) -> bool:
        """As the world grades."""
        return grade(text, item.source)

    def vote(self, item: Item, text: str) -> str:
        """The last number for problems with a number; the text otherwise."""
        return final_answer(text) if item.source.kind in ("word", "tool") else text.strip()


class DemoTaskConfig(BaseModel):
    """``[tasks.*]`` for the demo world; fields as in ``DemoTask``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: Literal["demo"] = "demo"
    split: Split = "heldout"
    first: int = Field(default=0, ge=0)
    count: int = Field(default=500, ge=1)
    kinds: tuple[Kind, ...] = ()

    def open(self) -> Task:
        """The task itself."""
        return DemoTask(self.split, self.first, self.count, self.kinds)
