"""Prompts from a JSONL file of ``{"prompt": ..., "answer": ...}`` lines."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from langchain_core.messages import AIMessage, convert_to_messages
from pydantic import BaseModel, ConfigDict, Field

from ...errors import InputError
from ..grading import GRADERS, Grader
from .items import Item, Task

Grading = Literal["exact", "numeric", "math"]

FIELDS = ("prompt", "answer", "id", "tools")
"""Of a line; others are left alone, unless their names are nearly one of these."""


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
        rows = _part(path, _read_lines(path), first, count)
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
        lines = path.read_text(encoding="utf-8-sig").split(
            "\n"
        )  # JSON may hold other line separators inside of strings
    except OSError as error:
        here = "" if path.is_absolute() else f" A relative path starts at the working directory, {Path.cwd()}."
        raise InputError(
            f"{path} cannot be read: {error.strerror}.", hint=f"Give a JSONL file of prompts.{here}"
        ) from error
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
        where = f"{path}, line {number}"
        if not isinstance(row, dict) or not row.get("prompt") or not str(row["prompt"]).strip():
            raise InputError(f"{where}: no prompt.", hint='Each line is {"prompt": ..., "answer": ...}.')
        for key in row:
            if key not in FIELDS and (meant := get_close_matches(key, FIELDS, n=1, cutoff=0.75)):
                raise InputError(f"{where}: there is no field {key!r}.", hint=f"Did you mean {meant[0]!r}?")
        name = row.get("id", number)
        if not isinstance(name, str | int) or isinstance(name, bool):
            raise InputError(f"{where}: id is {json.dumps(name)}.", hint="An id is a text or a whole number.")
        rows.append({**row, "id": str(name), "where": where})
    return rows


def _part(path: Path, rows: Sequence[dict[str, Any]], first: int, count: int | None) -> Sequence[dict[str, Any]]:
    if not rows:
        raise InputError(f"{path} holds no prompts.", hint='Each line is {"prompt": ..., "answer": ...}.')
    if first >= len(rows) or (count is not None and first + count > len(rows)):
        wanted = "" if count is None else f", and count is {count}"
        raise InputError(
            f"{path} holds {len(rows)} prompts, {max(0, len(rows) - first)} of them from first = {first} on{wanted}.",
            hint="Take another part; without `count` it goes to the end.",
        )
    return rows[first : None if count is None else first + count]


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
        _check(messages)
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise TypeError("tools must be a list of objects")
        for tool in tools:
            if not isinstance(tool.get("function", tool), dict) or not tool.get("function", tool).get("name"):
                raise TypeError(f"a tool has no name: {json.dumps(tool)[:80]}")
    except (TypeError, ValueError, NotImplementedError) as error:
        raise InputError(
            f"{row['where']}: the prompt with id {row['id']!r} cannot be used: {error}.",
            hint="A prompt is a string or a list of messages in OpenAI's format; tools are a list in the same.",
        ) from error
    return Item(row["id"], messages, tuple(tools), str(row.get("answer", "")), where=row["where"])


def _check(messages: Sequence[Any]) -> None:
    """Refuse messages after which a model does not speak, or that say nothing.

    Raises:
        TypeError, ValueError, NotImplementedError: what is wrong.
    """
    read = convert_to_messages(list(messages))
    for at, (given, message) in enumerate(zip(messages, read, strict=True)):
        spoke = isinstance(message, AIMessage)
        if isinstance(given, dict) and given.get("content") is None and not (spoke and given.get("tool_calls")):
            raise ValueError(f"message {at} ({message.type}) has no content")
    if isinstance(read[-1], AIMessage):
        raise ValueError("it ends with the assistant's answer; it must end where the model is to speak")


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
