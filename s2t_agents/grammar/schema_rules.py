"""A relaxed schema as a grammar rule, and a bound on the length of its shortest values; patterns of the formats of
strings that llguidance does not know (``FORMAT_PATTERNS``), which grammar and validation share.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from re import _parser  # type: ignore[attr-defined]  # nothing public tells the width of a pattern
from typing import Any

from .canonical_schema import Schema, definition

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

_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"  # 0001 to 9999
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]+)?(?:[zZ]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_HEX = "[0-9a-fA-F]"
_POINTER = "(?:/(?:[^~/]|~[01])*)*"

FORMAT_PATTERNS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}[tT]{_TIME}$",
    **{f"uuid{n}": f"^{_HEX}{{8}}-{_HEX}{{4}}-{n}{_HEX}{{3}}-[89abAB]{_HEX}{{3}}-{_HEX}{{12}}$" for n in range(1, 9)},
    "json-pointer": f"^{_POINTER}$",
    "relative-json-pointer": f"^(?:0|[1-9][0-9]*)(?:#|{_POINTER})$",
    "base64": "^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$",
    "base64url": "^(?:[A-Za-z0-9_-]{4})*(?:[A-Za-z0-9_-]{2}(?:==)?|[A-Za-z0-9_-]{3}=?)?$",
    "idn-email": "^[^@]+@[^@]+$",
}
"""Formats as patterns, for the grammar and for validation: days that exist, no leap seconds, the version of a UUID."""

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

    It bounds what accepting one more token can make necessary: exact for plain types, the shortest match and a fixed
    allowance for patterns and formats, references counted once.
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
            referred[reference] = _short_value_bytes(definition(root, reference), root, referred)
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
    if isinstance(pattern := schema.get("pattern"), str):
        size += min(shortest_match(pattern), MAX_VALUE_BYTES)
    signs = {"minimum": 1, "exclusiveMinimum": 1, "maximum": -1, "exclusiveMaximum": -1, "multipleOf": 1}
    bounds = [(schema[key], sign) for key, sign in signs.items() if isinstance(schema.get(key), int | float)]
    size += max((len(str(bound)) for bound, sign in bounds if bound * sign > 0), default=0)  # others permit 0
    return size + 6


def shortest_match(pattern: str) -> int:
    """A lower bound of the characters of a text in which a pattern matches; 0 if Python cannot parse the pattern."""
    parts = parsed_pattern(pattern)
    return int(parts.getwidth()[0]) if parts is not None else 0


@lru_cache(maxsize=256)
def parsed_pattern(pattern: str) -> Any:
    """A pattern's parts, as Python's ``re`` reads it; None if it cannot."""
    try:
        return _parser.parse(pattern)
    except (re.error, RecursionError, OverflowError):
        return None


def _list(schema: Mapping[str, Any], key: str) -> list[Any]:
    value = schema.get(key)
    return value if isinstance(value, list) else []


def _number(schema: Mapping[str, Any], key: str) -> int:
    value = schema.get(key)
    return int(value) if isinstance(value, int) else 0
