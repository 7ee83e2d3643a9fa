"""What a task is: prompts, what their tools return, and when an answer is right."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...errors import InputError

Message = dict[str, Any]
"""A message in OpenAI's format."""

Call = tuple[str, Mapping[str, Any]]
"""A tool call: name and arguments."""


def calls_text(calls: Sequence[Call]) -> str:
    """Tool calls as the text of an answer: equal calls are equal texts."""
    return json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls], ensure_ascii=False)


def calls_in(text: str) -> list[Call]:
    """The calls that ``calls_text`` wrote; none in any other text."""
    try:
        return [(call["name"], call["arguments"]) for call in json.loads(text)]
    except (ValueError, TypeError, KeyError):
        return []


@dataclass(frozen=True)
class Calls:
    """An answer that is calls, as with ``tool_choice="any"``.

    Attributes:
        several: whether there may be more than one.
    """

    several: bool = False


@dataclass(frozen=True)
class Item:
    """One prompt.

    Attributes:
        id: unique in its task.
        messages: the conversation.
        tools: shown in the prompt.
        source: whatever its task needs to grade it.
        calls: only calls of the tools may answer it, under their grammar; None: any tokens may.
        identity: equal for the same item in two tasks; None: its messages are.
        where: file and line it was read from, for errors; None where there is none.
    """

    id: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    source: Any
    calls: Calls | None = None
    identity: str | None = None
    where: str | None = None


class Task(Protocol):
    """Prompts and how to grade them.

    Attributes:
        name: for reports.
    """

    name: str

    @property
    def items(self) -> Sequence[Item]:
        """In a fixed order, ids unique."""
        ...

    def call(self, item: Item, name: str, arguments: Mapping[str, Any]) -> str | None:
        """What a tool of this item returns; None where calling is the answer, whose text is then ``calls_text``."""
        ...

    def grade(self, item: Item, text: str) -> bool:
        """Whether the final text is right."""
        ...

    def vote(self, item: Item, text: str) -> str:
        """The text's answer in a form in which equal answers are equal strings, for majority votes."""
        ...


def part_of(items: Sequence[Item], path: Path, first: int, every: int, count: int | None) -> Sequence[Item]:
    """From ``first`` on each ``every``-th, ``count`` of them at most.

    Raises:
        InputError: none is left.
    """
    part = items[first::every][:count]
    if not part:
        raise InputError(f"{path} holds {len(items)} prompts of this task, none from place {first} on.")
    return part
