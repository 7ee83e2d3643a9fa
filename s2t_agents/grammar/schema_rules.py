"""A relaxed schema as a grammar rule, and a bound on the length of its shortest values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Schema = dict[str, Any]

JSON_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": 'nrtbf\\"',
}
"""JSON style of ``json.dumps``, which templates use too; no ``\\u`` escapes, so no lone surrogates."""

_SCHEMA_KEYWORDS = (
    *("properties", "additionalProperties", "patternProperties", "propertyNames", "unevaluatedProperties"),
    *("allOf", "anyOf", "oneOf", "$ref", "$dynamicRef", "$recursiveRef", "enum", "const", "required", "if"),
)

MAX_VALUE_BYTES = 2**24
"""Bytes of a value that no model's context window holds."""


def json_rule(schema: Mapping[str, Any]) -> str:
    """The right-hand side of a grammar rule for JSON of a relaxed schema."""
    return "%json " + json.dumps({**schema, "x-guidance": JSON_STYLE})


def parameters_of(function: Mapping[str, Any]) -> Schema:
    """The schema of a tool's arguments as given; an empty object for a tool that declares none."""
    parameters = dict(function.get("parameters") or {})
    if not any(key in parameters for key in _SCHEMA_KEYWORDS):
        parameters["properties"] = {}
    return parameters


def longest_minimum_bytes(schema: Any) -> int:
    """The largest of the shortest-value lengths, in bytes, over the schema and all its subschemas.

    It bounds what accepting one more token can make necessary: exact for plain types, a fixed allowance for patterns
    and formats, references counted once.
    """
    sizes = [64]
    referred: dict[str, int] = {}
    stack = [schema]
    while stack:
        here = stack.pop()
        if isinstance(here, Mapping):
            sizes.append(_short_value_bytes(here, schema, referred))
            stack += here.values()
        elif isinstance(here, list):
            stack += here
    return max(sizes)


def _short_value_bytes(schema: Any, root: Any, referred: dict[str, int]) -> int:
    """Bytes of a short value of the schema; of alternatives, the longest one."""
    if not isinstance(schema, Mapping):
        return 2
    if isinstance(reference := schema.get("$ref"), str):
        if reference not in referred:
            referred[reference] = 0  # a recursive reference adds nothing the second time
            referred[reference] = _short_value_bytes(_resolved(reference, root), root, referred)
        return referred[reference]
    choices = [*schema.get("enum", ()), *([schema["const"]] if "const" in schema else [])]
    if choices:
        return max(len(json.dumps(choice, ensure_ascii=False).encode()) for choice in choices)
    size = max(
        (_short_value_bytes(each, root, referred) for key in ("anyOf", "oneOf") for each in _list(schema, key)),
        default=0,
    )
    size += sum(_short_value_bytes(each, root, referred) for each in _list(schema, "allOf"))
    properties = schema.get("properties")
    properties = properties if isinstance(properties, Mapping) else {}
    for name in _list(schema, "required"):
        size += len(json.dumps(name).encode()) + 4 + _short_value_bytes(properties.get(name), root, referred)
    if _number(schema, "minItems") > MAX_VALUE_BYTES:
        return 0  # no value fits, see ``relaxation``
    size += _number(schema, "minItems") * (2 + _short_value_bytes(schema.get("items"), root, referred))
    size += sum(2 + _short_value_bytes(each, root, referred) for each in _list(schema, "prefixItems"))
    size += _number(schema, "minLength") + 12 * _number(schema, "minProperties")
    size += 48 * (("pattern" in schema) + ("format" in schema))
    size += max(
        (len(str(schema[key])) for key in ("minimum", "exclusiveMinimum", "multipleOf") if key in schema), default=0
    )
    return size + 6


def _list(schema: Mapping[str, Any], key: str) -> list[Any]:
    value = schema.get(key)
    return value if isinstance(value, list) else []


def _number(schema: Mapping[str, Any], key: str) -> int:
    value = schema.get(key)
    return int(value) if isinstance(value, int) else 0


def _resolved(reference: str, root: Any) -> Any:
    here = root
    for part in reference.removeprefix("#").strip("/").split("/"):
        if part:
            here = here.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(here, Mapping) else None
    return here
