"""Tools and schemas to rules in llguidance's Lark dialect: text, thoughts, Hermes calls, JSON replies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import BadSchema, ConfigError
from ..tool_calls import CLOSE, OPEN
from .schemas import SPELLING, closed, parameters_of

if TYPE_CHECKING:
    from .grammar import Vocabulary

CHOICES = ("auto", "any", "none")
"""Tool choices that name no tool."""


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


def arguments_of(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a tool's arguments.

    Raises:
        BadSchema: one that holds itself.
    """
    try:
        return parameters_of(function)
    except RecursionError:
        raise BadSchema(f"The arguments of tool {function['name']!r} are nested without end.") from None


def reply_of(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A reply's schema, closed.

    Raises:
        BadSchema: one that holds itself.
    """
    try:
        return dict(closed(dict(schema)))
    except RecursionError:
        raise BadSchema("The output schema is nested without end.") from None


def json_rule(schema: Mapping[str, Any]) -> str:
    """The right side of a rule for JSON of a schema.

    Raises:
        BadSchema: the schema itself is no JSON.
    """
    try:
        return "%json " + json.dumps({**schema, "x-guidance": SPELLING})
    except (TypeError, ValueError, RecursionError) as error:
        raise BadSchema(
            f"The schema is no JSON: {error}.", hint="Use plain dicts, lists, strings and numbers."
        ) from None


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
        head = json.dumps(f'\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": ')
        rules += [f'body_{i}: {head} args_{i} "}}\\n"', f"args_{i}: {json_rule(schema)}"]
    return rules


def auto_start(words: Vocabulary, reply: Mapping[str, Any] | None = None) -> str:
    """Text, calls, or calls after text. A tag that is spelt out ends the text as soon as it is complete.

    With a reply's schema: that JSON, or calls.
    """
    if reply is not None:
        return f"start: reply | calls\nreply: {json_rule(reply)}"
    if words.tags[0] is not None:
        return f"start: said | calls | said calls\n{said(words)}"
    return f"start: said | opened rest\nopened[lazy]: /(.|\\n)*{OPEN}/\n{said(words)}"


def said(words: Vocabulary) -> str:
    """Text that is not only white space; a thought may come before it."""
    text = "TEXT: /[ \\t\\n\\r]*[^ \\t\\n\\r](.|\\n)*/"
    if len(words.thought) == 2:
        begin, end = words.thought
        return f"said: TEXT | <[{begin}]> THOUGHT <[{end}]> TEXT\nTHOUGHT: /(.|\\n)*/\n{text}"
    return f"said: TEXT\n{text}"
