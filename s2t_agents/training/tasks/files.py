"""Prompts from a JSONL file of ``{"prompt": ..., "answer": ...}`` lines."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from langchain_core.messages import convert_to_messages
from pydantic import BaseModel, ConfigDict, Field

from ...errors import InputError
from ..grading import GRADERS, Grader
from .items import Item, Task

Grading = Literal["exact", "numeric", "math"]


class JsonlTask:
    """A file of ``{"prompt": str or messages, "answer": str, "id"?: str, "tools"?: [...]}`` lines.

    Raises:
        InputError: no such file, no prompts in it, broken lines, duplicate ids, answers missing or not gradable.
        ConfigError: math grading without its library.
    """

    def __init__(
        self, path: Path, grading: Grading, *, answers: bool = True, first: int = 0, count: int | None = None
    ) -> None:
        self.name = path.stem
        self._grader = GRADERS[grading]()
        rows = list(_read_lines(path))[first : None if count is None else first + count]
        if not rows:
            raise InputError(f"{path} holds no prompts.", hint='Each line is {"prompt": ..., "answer": ...}.')
        if answers:
            _need_answers(path, rows, self._grader)
        self.items: list[Item] = [_item(row) for row in rows]
        twice = [name for name, times in Counter(item.id for item in self.items).items() if times > 1]
        if twice:
            raise InputError(
                f"{path} has {len(twice)} ids more than once, {twice[0]!r} first.", hint="Make ids unique."
            )

    def call(self, item: Item, name: str, arguments: Mapping[str, Any]) -> str:
        """A file has no tools to run: always an error, as an agent would see it."""
        return json.dumps({"error": f"no tool named {name}"})

    def grade(self, item: Item, text: str) -> bool:
        """As the chosen grader says."""
        return self._grader.right(text, item.source)

    def vote(self, item: Item, text: str) -> str:
        """The text's final answer, in the grader's form."""
        return self._grader.vote(item.id, text)


def _read_lines(path: Path) -> Sequence[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold other line separators inside of strings
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.", hint="Give a JSONL file of prompts.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error.reason} at byte {error.start}.") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not JSON ({error}).") from error
        if not isinstance(row, dict) or not row.get("prompt"):
            raise InputError(f"{path}, line {number}: no prompt.", hint='Each line is {"prompt": ..., "answer": ...}.')
        rows.append({"id": str(row.get("id", number)), **{key: row[key] for key in row if key != "id"}})
    return rows


def _need_answers(path: Path, rows: Sequence[dict[str, Any]], grader: Grader) -> None:
    lacking = [row["id"] for row in rows if row.get("answer") in (None, "")]
    if lacking:
        raise InputError(
            f"{path} has no answer for {len(lacking)} of {len(rows)} prompts, id {lacking[0]!r} first.",
            hint="Answers are needed to grade; collecting alone goes without (answers = false).",
        )
    odd = [row for row in rows if not grader.gradable(str(row["answer"]))]
    if odd:
        raise InputError(
            f"{path}: {len(odd)} of {len(rows)} answers are not one number, {str(odd[0]['answer'])[:80]!r} of id "
            f"{odd[0]['id']!r} first.",
            hint="Give the number alone or after ####, or take exact or math grading.",
        )


def _item(row: dict[str, Any]) -> Item:
    prompt = row["prompt"]
    messages = tuple(prompt) if isinstance(prompt, list) else ({"role": "user", "content": prompt},)
    tools = row.get("tools") or []
    try:
        if not isinstance(prompt, str | list):
            raise TypeError(f"it is of type {type(prompt).__name__}")
        convert_to_messages(list(messages))
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise TypeError("tools must be a list of objects")
    except (TypeError, ValueError, NotImplementedError) as error:
        raise InputError(
            f"the prompt with id {row['id']!r} cannot be used: {error}.",
            hint="A prompt is a string or a list of messages in OpenAI's format; tools are a list in the same.",
        ) from error
    return Item(row["id"], messages, tuple(tools), str(row.get("answer", "")))


class JsonlTaskConfig(BaseModel):
    """``[tasks.*]`` for a JSONL file: ``first`` and ``count`` take a part of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: Literal["jsonl"]
    path: Path
    grading: Grading = "numeric"
    answers: bool = True
    first: int = Field(default=0, ge=0)
    count: int | None = Field(default=None, ge=1)

    def open(self) -> Task:
        """The task itself."""
        return JsonlTask(self.path, self.grading, answers=self.answers, first=self.first, count=self.count)
