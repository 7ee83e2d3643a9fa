"""One generated problem: what is asked, which tools there are, what they return, and how a right conversation goes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .arithmetic import Move

Kind = Literal["word", "tool", "call", "talk"]
Split = Literal["train", "heldout", "longer", "larger", "unseen", "hard"]
Message = dict[str, Any]
"""A message in OpenAI's format."""


@dataclass(frozen=True)
class Call:
    """The one right tool call of a problem, and what the tool returns for it."""

    name: str
    arguments: Mapping[str, Any]
    result: str


@dataclass(frozen=True)
class Working:
    """The arithmetic of an answer: `before`, then one sentence per operation, then the answer line."""

    start: int
    moves: tuple[Move, ...]
    before: str = ""


@dataclass(frozen=True)
class Problem:
    """A problem of the demo world; the same seed, split and kind always make the same one.

    `expected` is the final number or text; for small talk the usual reply (any reply without a tool call counts).
    `gold` is a whole right conversation as OpenAI messages, from the system prompt (if any) to the answer; the first
    ``len(prompt)`` of them are what a model is given.
    """

    seed: int
    split: Split
    kind: Kind
    system: str | None
    tools: tuple[dict[str, Any], ...]
    question: str
    expected: str
    gold: tuple[Message, ...]
    prompt: tuple[Message, ...]
    expected_call: Call | None = None
    working: Working | None = None

    def call(self, name: str, args: Mapping[str, Any] | str) -> str:
        """Run a tool as the agent would: the right call gets its result, any other an error in JSON."""
        if self.is_expected_call(name, args):
            assert self.expected_call is not None
            return self.expected_call.result
        known = {tool["function"]["name"] for tool in self.tools}
        return json.dumps({"error": "nothing found" if name in known else f"no tool named {name}"})

    def is_expected_call(self, name: str, args: Mapping[str, Any] | str) -> bool:
        """Whether this is exactly the call that the problem needs; `args` may be a mapping or its JSON."""
        if self.expected_call is None:
            return False
        try:
            given = json.loads(args) if isinstance(args, str) else dict(args)
        except ValueError:
            return False
        return bool(name == self.expected_call.name and given == dict(self.expected_call.arguments))


def answer_line(answer: int | str) -> str:
    """The last sentence of every worked answer."""
    return f"The answer is {answer}."


def grade(answer_text: str, problem: Problem) -> bool:
    """Whether the final text of a conversation is right.

    Numbers are read from the answer line, or from the last number if there is no such line; replies of tools must be
    named in the text; small talk is right when it is a reply at all, and no tool call.
    """
    text = answer_text.strip()
    if problem.kind == "talk":
        return bool(text) and "<tool_call>" not in text
    if problem.kind == "call":
        return problem.expected in text
    lines = re.findall(r"answer is\s*(-?\d+)", text)
    numbers = lines or re.findall(r"-?\d+", text)
    return bool(numbers) and int(numbers[-1]) == int(problem.expected)


def tool_call_message(call: Call) -> Message:
    """The assistant's message which makes `call`, arguments as JSON text."""
    function = {"name": call.name, "arguments": json.dumps(dict(call.arguments), ensure_ascii=False)}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
    }


def tool_result_message(call: Call) -> Message:
    """The tool's message which answers `tool_call_message`."""
    return {"role": "tool", "tool_call_id": "call_1", "name": call.name, "content": call.result}
