"""Word problems as their authors ship them: SVAMP (a JSON list) and GSM8K (JSON lines)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ...errors import InputError
from ..grading import Numeric
from .items import Item, Task, part_of

ASK = "\n\nWork step by step, and end with: The answer is <number>."


class WordProblemsTask:
    """All problems of a file, graded by their final number.

    Args:
        name: of the collection.
        path: its file.

    Raises:
        InputError: no such file, or not in the collection's form.
    """

    def __init__(self, name: Literal["svamp", "gsm8k"], path: Path) -> None:
        self.name: str = name
        self._grader = Numeric()
        read = _svamp if name == "svamp" else _gsm8k
        try:
            problems = read(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}.", hint=f"Give a file of {name}.") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path} is no file of {name}: {error!r}.") from error
        self.items = [
            Item(f"{name}-{at}", ({"role": "user", "content": question + ASK},), (), answer)
            for at, (question, answer) in enumerate(problems)
        ]

    def call(self, item: Item, name: str, arguments: Mapping[str, Any]) -> str:
        """There are no tools."""
        return json.dumps({"error": f"no tool named {name}"})

    def grade(self, item: Item, text: str) -> bool:
        """Whether the final number is right."""
        return self._grader.right(text, item.source)

    def vote(self, item: Item, text: str) -> str:
        """The final number."""
        return self._grader.vote(item.id, text)


def _svamp(text: str) -> list[tuple[str, str]]:
    return [
        (f"{row['Body'].strip().removesuffix('.')}. {row['Question'].strip()}", str(row["Answer"]))
        for row in json.loads(text)
    ]


def _gsm8k(text: str) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    return [(row["question"], row["answer"].rpartition("####")[2].strip()) for row in rows]


class WordProblemsConfig(BaseModel):
    """``[tasks.*]`` for word problems: ``first``, ``every`` and ``count`` take a part of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: Literal["svamp", "gsm8k"]
    path: Path
    first: int = Field(default=0, ge=0)
    every: int = Field(default=1, ge=1)
    count: int | None = Field(default=None, ge=1)

    def open(self) -> Task:
        """The task itself."""
        task = WordProblemsTask(self.task, self.path)
        task.items = list(part_of(task.items, self.path, self.first, self.every, self.count))
        return task
