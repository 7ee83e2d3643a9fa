"""Function calls of the Berkeley Function Calling Leaderboard: ``BFCL_v4_*.json`` and ``possible_answer/``.

One question, the functions that may answer it, one turn. The calls are the answer; they are graded on their syntax
tree, see ``bfcl_grader``. Functions are shown as a client of OpenAI's interface shows them: JSON schema's names for
types, and no dots in the names of functions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ...errors import InputError
from .bfcl_grader import called_name, right_calls
from .items import Calls, Item, Task, calls_in, part_of

Category = Literal[
    "simple_python",
    "multiple",
    "parallel",
    "parallel_multiple",
    "live_simple",
    "live_multiple",
    "live_parallel",
    "live_parallel_multiple",
]

TYPES: dict[str, str | None] = {"dict": "object", "float": "number", "tuple": "array", "any": None}
"""The leaderboard's own types in JSON schema's words; None permits anything."""


class BfclTask:
    """Questions of some categories.

    Args:
        path: the data folder.
        categories: taken one after the other.
        apart_from: questions that these categories ask too are left out.
        functions: as many are shown, at most: those that the answer calls, and the first of the others.
        parallel: whether one answer may hold several calls; None: where the category asks for several.
        mixed: in an order by a hash of their ids, each question once, so that its parts share nothing.
        longest: characters of a question and its functions, as JSON; longer ones are left out.

    Raises:
        InputError: no such data, or not in the leaderboard's form.
    """

    def __init__(
        self,
        path: Path,
        categories: Sequence[Category],
        *,
        apart_from: Sequence[Category] = (),
        functions: int | None = None,
        parallel: bool | None = None,
        mixed: bool = False,
        longest: int | None = None,
    ) -> None:
        self.name = f"bfcl/{'+'.join(categories)}"
        taken = {_asked(row) for category in apart_from for row in _rows(path, category)}
        self.items: Sequence[Item] = [
            _item(row, functions, "parallel" in category if parallel is None else parallel)
            for category in categories
            for row in _rows(path, category)
            if _asked(row) not in taken
        ]
        if longest is not None:
            self.items = [item for item in self.items if len(json.dumps([item.messages, item.tools])) <= longest]
        if mixed:
            ordered = sorted(self.items, key=lambda item: hashlib.sha256(item.id.encode()).digest())
            self.items = list({json.dumps(item.messages): item for item in reversed(ordered)}.values())[::-1]

    def call(self, item: Item, name: str, arguments: Mapping[str, Any]) -> None:
        """Nothing comes back: the call is the answer."""

    def grade(self, item: Item, text: str) -> bool:
        """Whether these are the calls of a possible answer."""
        functions, answers = item.source
        return right_calls(functions, answers, calls_in(text))

    def vote(self, item: Item, text: str) -> str:
        """The calls."""
        return text


def json_schema(described: Any) -> Any:
    """A function's parameters in JSON schema's own words, at any depth; what is not about types stays.

    The leaderboard writes the ``enum`` of an array's items beside them.
    """
    if isinstance(described, list):
        return [json_schema(each) for each in described]
    if not isinstance(described, Mapping):
        return described
    made: dict[str, Any] = {}
    for key, value in described.items():
        if key == "type" and isinstance(value, str):
            if (kind := TYPES.get(value, value)) is not None:
                made[key] = kind
        elif key == "properties" and isinstance(value, Mapping):
            made[key] = {name: json_schema(inner) for name, inner in value.items()}  # one may be called "type"
        elif key in ("default", "enum", "const", "examples"):
            made[key] = value
        else:
            made[key] = json_schema(value)
    if made.get("type") == "array" and not any(isinstance(each, list) for each in made.get("enum", [[]])):
        made["items"] = {**made.get("items", {}), "enum": made.pop("enum")}
    return made


def _rows(path: Path, category: Category) -> list[dict[str, Any]]:
    """The questions of a category, each with its ``ground_truth``."""
    asked = _read(path / f"BFCL_v4_{category}.json")
    answers = {
        row["id"]: row.get("ground_truth") for row in _read(path / "possible_answer" / f"BFCL_v4_{category}.json")
    }
    lacking = [row["id"] for row in asked if not answers.get(row["id"])]
    if lacking:
        raise InputError(
            f"{path} has no possible answer for {len(lacking)} questions of {category}, {lacking[0]!r} first."
        )
    return [{**row, "ground_truth": answers[row["id"]]} for row in asked]


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    except OSError as error:
        raise InputError(
            f"{file} cannot be read: {error.strerror}.", hint="Give the data folder of the package bfcl-eval."
        ) from error
    except ValueError as error:
        raise InputError(f"{file} is not JSON lines: {error}.") from error
    if not all(isinstance(row, dict) and "id" in row for row in rows):
        raise InputError(f"{file} has rows without an id.")
    return rows


def _asked(row: Mapping[str, Any]) -> str:
    return json.dumps(row["question"])


def _item(row: Mapping[str, Any], most: int | None, parallel: bool) -> Item:
    answers: list[dict[str, Any]] = row["ground_truth"]
    named = {name for answer in answers for name in answer}
    first = sorted(row["function"], key=lambda function: function["name"] not in named)[:most]
    shown = [function for function in row["function"] if function in first]
    tools = tuple(map(_tool, shown))
    return Item(row["id"], tuple(row["question"][0]), tools, (row["function"], answers), Calls(parallel))


def _tool(function: Mapping[str, Any]) -> dict[str, Any]:
    made = {
        **function,
        "name": called_name(function["name"]),
        "parameters": json_schema(function["parameters"]),
    }
    return {"type": "function", "function": made}


class BfclTaskConfig(BaseModel):
    """``[tasks.*]`` for function calls: ``first`` and ``count`` take a part of them, ``every`` spaces it out.

    Other fields as in ``BfclTask``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: Literal["bfcl"]
    path: Path
    categories: tuple[Category, ...] = ("simple_python",)
    apart_from: tuple[Category, ...] = ()
    functions: int | None = Field(default=None, ge=1)
    parallel: bool | None = None
    mixed: bool = False
    longest: int | None = Field(default=None, ge=1)
    first: int = Field(default=0, ge=0)
    every: int = Field(default=1, ge=1)
    count: int | None = Field(default=None, ge=1)

    def open(self) -> Task:
        """The task itself."""
        task = BfclTask(
            self.path,
            self.categories,
            apart_from=self.apart_from,
            functions=self.functions,
            parallel=self.parallel,
            mixed=self.mixed,
            longest=self.longest,
        )
        task.items = part_of(task.items, self.path, self.first, self.every, self.count)
        return task
