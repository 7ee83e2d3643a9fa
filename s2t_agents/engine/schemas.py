"""JSON schemas made ready for the grammar, and how long their shortest values can get."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Schema = dict[str, Any]

SPELLING = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": 'nrtbf\\"',
}
"""JSON as ``json.dumps`` writes it, which is how templates show it; no ``\\u`` escapes, so no lone surrogates."""

_JOINED = ("allOf", "anyOf", "oneOf", "$ref", "$dynamicRef", "patternProperties", "unevaluatedProperties")
_SUBSCHEMAS = ("properties", "$defs", "definitions", "patternProperties")
_LISTS = ("anyOf", "oneOf", "prefixItems")
_SINGLE = ("items", "additionalProperties")


def closed(schema: Any) -> Any:
    """The schema with every object that names its properties closed to others: what fits it fits the original.

    Objects joined from several schemas are left as they are, as are those that say themselves what they take.
    """
    if not isinstance(schema, Mapping):
        return schema
    done = dict(schema)
    for key in _SUBSCHEMAS:
        if isinstance(done.get(key), Mapping):
            done[key] = {name: closed(inner) for name, inner in done[key].items()}
    for key in _LISTS:
        if isinstance(done.get(key), list):
            done[key] = [closed(inner) for inner in done[key]]
    for key in _SINGLE:
        if isinstance(done.get(key), Mapping):
            done[key] = closed(done[key])
    if "properties" in done and not any(key in done for key in (*_JOINED, "additionalProperties")):
        done["additionalProperties"] = False
    return done


def parameters_of(function: Mapping[str, Any]) -> Schema:
    """The schema of a tool's arguments; a tool that declares none takes an empty object."""
    parameters = dict(function.get("parameters") or {})
    if not any(key in parameters for key in _JOINED):
        parameters = {"type": "object", **parameters}
        if "additionalProperties" not in parameters:
            parameters.setdefault("properties", {})
    return dict(closed(parameters))


def heaviest(schema: Any) -> int:
    """Bytes of the longest among the shortest values of the schema and of all schemas in it.

    An estimate from above of what one more token can oblige the model to write: exact for plain types, a fixed
    allowance for patterns and formats, and references counted once.
    """
    sizes = [64]
    referred: dict[str, int] = {}
    stack = [schema]
    while stack:
        here = stack.pop()
        if isinstance(here, Mapping):
            sizes.append(_least(here, schema, referred))
            stack += here.values()
        elif isinstance(here, list):
            stack += here
    return max(sizes)


def _least(schema: Any, root: Any, referred: dict[str, int]) -> int:
    """Bytes of a short value of the schema; the longest branch where there is a choice."""
    if not isinstance(schema, Mapping):
        return 2
    if isinstance(reference := schema.get("$ref"), str):
        if reference not in referred:
            referred[reference] = 0  # a value that holds itself adds nothing the second time
            referred[reference] = _least(_resolved(reference, root), root, referred)
        return referred[reference]
    choices = [*schema.get("enum", ()), *([schema["const"]] if "const" in schema else [])]
    if choices:
        return max(len(json.dumps(choice, ensure_ascii=False).encode()) for choice in choices)
    size = max((_least(each, root, referred) for key in ("anyOf", "oneOf") for each in _list(schema, key)), default=0)
    size += sum(_least(each, root, referred) for each in _list(schema, "allOf"))
    properties = schema.get("properties")
    properties = properties if isinstance(properties, Mapping) else {}
    for name in _list(schema, "required"):
        size += len(json.dumps(name).encode()) + 4 + _least(properties.get(name), root, referred)
    size += _number(schema, "minItems") * (2 + _least(schema.get("items"), root, referred))
    size += sum(2 + _least(each, root, referred) for each in _list(schema, "prefixItems"))
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
    return int(value) if isinstance(value, int | float) else 0


def _resolved(reference: str, root: Any) -> Any:
    here = root
    for part in reference.removeprefix("#").strip("/").split("/"):
        if part:
            here = here.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(here, Mapping) else None
    return here
