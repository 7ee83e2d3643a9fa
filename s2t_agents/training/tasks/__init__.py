"""Tasks: where prompts come from, what their tools return, and when an answer is right.

A task is any object with ``Task``'s four members. Built in are the demo world, JSONL files of
``{"prompt": ..., "answer": ...}`` lines, function calls of the Berkeley Function Calling Leaderboard, and the word
problems of SVAMP and GSM8K.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated

from pydantic import Field

from ...demo.problem import Split
from ...errors import ConfigError
from .bfcl import BfclTask, BfclTaskConfig
from .demo import DemoTask, DemoTaskConfig
from .files import Grading, JsonlTask, JsonlTaskConfig
from .items import Item, Message, Task
from .word_problems import WordProblemsConfig, WordProblemsTask

__all__ = [
    "BfclTask",
    "BfclTaskConfig",
    "DemoTask",
    "DemoTaskConfig",
    "Grading",
    "Item",
    "JsonlTask",
    "JsonlTaskConfig",
    "Message",
    "Split",
    "Task",
    "TaskConfig",
    "WordProblemsConfig",
    "WordProblemsTask",
    "disjoint",
    "prompts_hash",
]

TaskConfig = Annotated[
    DemoTaskConfig | JsonlTaskConfig | BfclTaskConfig | WordProblemsConfig, Field(discriminator="task")
]


def prompts_hash(task: Task) -> str:
    """Of everything that decides which prompts are sent and what may answer them: ids, messages, tools, calls."""
    digest = hashlib.sha256()
    for item in task.items:
        sent = [item.id, item.messages, item.tools] + ([item.calls.several] if item.calls else [])
        digest.update(json.dumps(sent, ensure_ascii=True, default=str).encode())
    return digest.hexdigest()[:16]


def disjoint(train: Task, test: Task, names: tuple[str, str] | None = None) -> None:
    """Refuse two tasks that share an item: the same problem of the demo world, or the same messages elsewhere.

    Args:
        train: one of them.
        test: the other.
        names: of both, for the error; None takes the tasks' own.

    Raises:
        ConfigError: naming the first shared id.
    """
    known = set(map(_identity, train.items))
    shared = [item.id for item in test.items if _identity(item) in known]
    if shared:
        one, other = names or (train.name, test.name)
        raise ConfigError(
            f"{one} and {other} share {len(shared)} prompts, {shared[0]!r} first.",
            hint="What is trained, calibrated and tested on must share none: take other seeds, or another part of the "
            "file.",
        )


def _identity(item: Item) -> str:
    """What makes an item itself."""
    return item.identity or json.dumps(item.messages, default=str)
