"""Tools and schemas to rules in llguidance's Lark dialect: text, Hermes calls, JSON replies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import BadSchema, ConfigError
from ..formats.tool_calls import CLOSE, OPEN
from .relaxation import Relaxed, relaxed
from .schema_rules import json_rule, parameters_of

if TYPE_CHECKING:
    from .grammar import Vocabulary

CHOICES = ("auto", "any", "none")
"""Tool choices that name no tool."""

_CALL_END = "}\n"


def functions_of(tools: Sequence[Mapping[str, Any]], tool_choice: str) -> dict[str, dict[str, Any]]:
    """The tools' functions by name, once the choice fits them."""
    functions = {function["name"]: function for function in map(_function, tools)}
    if tool_choice not in (*CHOICES, *functions) or (tool_choice == "any" and not functions):
        known = ", ".join(map(repr, functions)) or "none bound"
        raise ConfigError(
            f"tool_choice={tool_choice!r} fits no tool (tools: {known}).",
            hint='Use "auto", "any", "none" or a tool\'s name.',
        )
    return functions


def _function(tool: Any) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if isinstance(function, Mapping):
        name, parameters = function.get("name"), function.get("parameters") or {}
        if isinstance(name, str) and name and isinstance(parameters, Mapping):
            return dict(function)
    raise BadSchema(
        f"This is no tool: {str(tool)[:200]}.",
        hint='Tools look like {"type": "function", "function": {"name": ..., "parameters": {...}}}.',
    )


def arguments_of(function: Mapping[str, Any]) -> Relaxed:
    """The schema of a tool's arguments, ready for the grammar.

    Raises:
        BadSchema: no call can fit it; the message names the tool.
    """
    return relaxed(parameters_of(function), f"the arguments of tool {function['name']!r}", only_objects=True)


def reply_of(schema: Mapping[str, Any]) -> Relaxed:
    """A reply's schema, ready for the grammar.

    Raises:
        BadSchema: no answer can fit it.
    """
    return relaxed(schema, "the output schema")


def call_texts(words: Vocabulary, name: str, arguments: str) -> list[str | int]:
    """One whole call of a tool, as text and ids of tags."""
    opening, closing = (tag if i is None else i for tag, i in zip((OPEN, CLOSE), words.tags, strict=True))
    return [opening, f"{_call_head(name)}{arguments}{_CALL_END}", closing]


def call_rules(
    words: Vocabulary, names: Sequence[str], schemas: Sequence[Mapping[str, Any]], *, several: bool
) -> list[str]:
    """``calls``, and ``rest``: what follows the first opening tag. Calls are a line break apart."""
    opening, closing = (
        json.dumps(tag) if i is None else f"<[{i}]>" for tag, i in zip((OPEN, CLOSE), words.tags, strict=True)
    )
    more = f' ("\\n" {opening} body {closing})*' if several else ""
    rules = [f"calls: {opening} rest", f"rest: body {closing}{more}"]
    rules.append("body: " + " | ".join(f"body_{i}" for i in range(len(names))))
    for i, (name, schema) in enumerate(zip(names, schemas, strict=True)):
        rules += [
            f"body_{i}: {json.dumps(_call_head(name))} args_{i} {json.dumps(_CALL_END)}",
            f"args_{i}: {json_rule(schema)}",
        ]
    return rules


def _call_head(name: str) -> str:
    return f'\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '


def auto_start(words: Vocabulary, reply: Mapping[str, Any] | None = None) -> str:
    """Text, calls, or calls after text. A tag that is spelt out ends the text as soon as it is complete.

    With a reply's schema: that JSON, or calls.
    """
    if reply is not None:
        return f"start: reply | calls\nreply: {json_rule(reply)}"
    if words.tags[0] is not None:
        return f"start: said | calls | said calls\n{said()}"
    return f"start: said | opened rest\nopened[lazy]: /(.|\\n)*{OPEN}/\n{said()}"


def said() -> str:
    """Text that is not only white space."""
    return "said: TEXT\nTEXT: /[ \\t\\n\\r]*[^ \\t\\n\\r](.|\\n)*/"
