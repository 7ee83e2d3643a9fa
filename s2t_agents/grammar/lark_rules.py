"""Tools and schemas to grammar rules in llguidance's Lark dialect: text, Hermes tool calls, JSON replies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..errors import BadSchema
from ..formats.tool_calls import CLOSE, OPEN
from .relaxation import RelaxedSchema, relax_schema
from .schema_rules import json_rule, parameters_of
from .vocabulary import Vocabulary

Choice = Literal["auto", "any", "none"]
"""Whether an answer may be text, calls or both, only calls, or only text."""

_CALL_END = "}\n"


def functions_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The tools' functions by name.

    Raises:
        BadSchema: not a tool.
    """
    return {function["name"]: function for function in map(_function, tools)}


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


def arguments_of(function: Mapping[str, Any]) -> RelaxedSchema:
    """The schema of a tool's arguments, relaxed for the grammar.

    Raises:
        BadSchema: no call can fit it; the message names the tool.
    """
    return relax_schema(parameters_of(function), f"the arguments of tool {function['name']!r}", only_objects=True)


def reply_of(schema: Mapping[str, Any]) -> RelaxedSchema:
    """The schema of a JSON reply, relaxed for the grammar.

    Raises:
        BadSchema: no answer can fit it.
    """
    return relax_schema(schema, "the output schema")


def call_texts(vocabulary: Vocabulary, name: str, arguments: str) -> list[str | int]:
    """One complete tool call, as text and token ids of the tags."""
    opening, closing = (tag if i is None else i for tag, i in zip((OPEN, CLOSE), vocabulary.tags, strict=True))
    return [opening, f"{_call_head(name)}{arguments}{_CALL_END}", closing]


def call_rules(
    vocabulary: Vocabulary, names: Sequence[str], schemas: Sequence[Mapping[str, Any]], *, several: bool
) -> list[str]:
    """The rules ``calls`` and ``rest`` (what follows the first opening tag); calls are separated by a line break."""
    opening, closing = (
        json.dumps(tag) if i is None else f"<[{i}]>" for tag, i in zip((OPEN, CLOSE), vocabulary.tags, strict=True)
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


def auto_start(vocabulary: Vocabulary, reply: Mapping[str, Any] | None = None) -> str:
    """The start rule for text, calls, or calls after text; a complete tag in plain characters ends the text.

    With a reply's schema it is that JSON, or calls.
    """
    if reply is not None:
        return f"start: reply | calls\nreply: {json_rule(reply)}"
    if vocabulary.tags[0] is not None:
        return f"start: text | calls | text calls\n{text_rule()}"
    return f"start: text | opened rest\nopened[lazy]: /(.|\\n)*{OPEN}/\n{text_rule()}"


def text_rule() -> str:
    """The rule for text that is not only white space."""
    return "text: TEXT\nTEXT: /[ \\t\\n\\r]*[^ \\t\\n\\r](.|\\n)*/"
