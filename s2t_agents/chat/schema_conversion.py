"""Classes, functions and schemas to OpenAI's form, by LangChain's conversion where it is lossless.

LangChain inlines definitions, which fails for recursive ones and those of other documents, and treats a schema without
``properties`` as one without arguments; those cases are converted here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from enum import Enum
from typing import Any, get_origin
from urllib.parse import unquote

from langchain_core.tools import BaseTool, StructuredTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel, PydanticUserError, TypeAdapter
from typing_extensions import is_typeddict

from ..errors import BadSchema, first_line
from ..grammar.canonical_schema import TYPES, canonicalize, follow_pointer, resolved

_FAILURES = (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, PydanticUserError, RecursionError)
_TOOL_KEYS = ("name", "function", "input_schema", "toolSpec")
"""Keys that make a mapping a tool rather than a schema."""

VALUE_ARGUMENT = "value"
"""Name of the argument that wraps a value which is not an object."""


def openai_tool(given: Any, *, strict: bool | None = None) -> dict[str, Any]:
    """A function, a tool, a class or a schema in OpenAI's form, without the ``strict`` key.

    Raises:
        BadSchema: not a tool.
    """
    given = _unwrapped(given)
    try:
        _check_type(given)
        if _is_titled_schema(given) and "properties" not in given:
            made = {"name": given["title"], "description": given.get("description", "")}
            rest = {key: value for key, value in given.items() if key not in ("title", "description")}
            return {"type": "function", "function": {**made, **({"parameters": rest} if rest else {})}}
        if _is_pydantic_only_type(given):
            schema = json_schema(given)
            made = {"name": schema.pop("title"), "description": schema.pop("description", "")}
            return {"type": "function", "function": {**made, "parameters": schema}}
        whole = _schema_to_keep(given)
        if whole is not None and isinstance(given, BaseTool):  # LangChain refuses some references
            one: dict[str, Any] = {
                "type": "function",
                "function": {"name": given.name, "description": given.description},
            }
        else:
            one = convert_to_openai_tool(given, strict=strict)
            _check_type(one)  # a LangChain tool may say that it takes free text
        function = {key: value for key, value in one["function"].items() if key != "strict"}
        if whole is not None:
            function["parameters"] = _without_titles(
                {k: v for k, v in whole.items() if k not in ("title", "description")}
            )
    except _FAILURES as error:
        raise BadSchema(
            f"This is no tool: {str(given)[:200]} ({first_line(error)}).",
            hint="Pass functions with docstrings and types, tools, pydantic classes or OpenAI's mappings.",
        ) from error
    return {**one, "function": function}


def json_schema(given: Any, *, strict: bool | None = None) -> dict[str, Any]:
    """A class or a schema as a JSON schema with a ``title``.

    Raises:
        BadSchema: not a schema.
    """
    given = _unwrapped(given)
    try:
        _check_type(given)
        if is_dataclass(given) or _is_pydantic_only_type(given):
            return {"title": _name_of(given), **_schema_of(given)}
        whole = _schema_to_keep(given) or (_schema_of(given) if _root_is_not_object(given) else None)
        if whole is None and _is_titled_schema(given) and not (strict and "properties" in given):
            whole = dict(given)
        if whole is not None:
            return {"title": getattr(given, "__name__", "reply"), **whole}
        return convert_to_json_schema(given, strict=strict)
    except _FAILURES as error:
        raise BadSchema(
            f"This is no output schema: {str(given)[:200]} ({first_line(error)}).",
            hint='Give a pydantic class, a TypedDict or a JSON schema with a "title".',
        ) from error


def is_object(schema: Mapping[str, Any]) -> bool:
    """Whether the values of a schema are objects, judged by its root, references and alternatives.

    Raises:
        BadSchema: it is not JSON.
    """
    root = canonicalize(schema).schema
    options: list[Any] = [root]
    for option in options:
        here = resolved(option, root)
        if not isinstance(here, dict) or here.get("type") == "object":
            continue
        if here.keys() & {"type", "enum", "const", "items", "prefixItems"}:
            return False
        options += [each for key in ("anyOf", "oneOf") for each in here.get(key, ()) if each not in options]
    return True


def wrap_in_object(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of an object with one property ``VALUE_ARGUMENT`` of the given schema; references are adjusted."""
    defs = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    inner = {key: value for key, value in schema.items() if key not in (*defs, "title", "description", "$schema")}
    moved = {key: _move_references(value) for key, value in defs.items()}
    return {
        "type": "object",
        "properties": {VALUE_ARGUMENT: _move_references(inner)},
        "required": [VALUE_ARGUMENT],
        **moved,
    }


def _move_references(node: Any) -> Any:
    """Rewrite references to the old root as references below the property."""
    if isinstance(node, list):
        return [_move_references(each) for each in node]
    if not isinstance(node, Mapping):
        return node
    out = {key: _move_references(value) for key, value in node.items()}
    given: Any = node.get("$ref")
    pointer = unquote(given) if isinstance(given, str) else ""
    if pointer == "#" or (pointer.startswith("#/") and not pointer.startswith(("#/$defs/", "#/definitions/"))):
        out["$ref"] = f"#/properties/{VALUE_ARGUMENT}{given[1:]}"
    return out


def _unwrapped(given: Any) -> Any:
    """The schema, titled by its name, inside OpenAI's ``json_schema`` form or its inner ``{"name", "schema"}``."""
    if isinstance(given, dict) and given.get("type") == "json_schema" and isinstance(given.get("json_schema"), dict):
        given = given["json_schema"]
    if not (isinstance(given, dict) and isinstance(given.get("schema"), dict) and isinstance(given.get("name"), str)):
        return given
    described = {"description": given["description"]} if isinstance(given.get("description"), str) else {}
    return {**given["schema"], "title": given["name"], **described}


def _check_type(given: Any) -> None:
    """Refuse a provider's own tool (web search, free text, ...), which is no function with a schema (ValueError)."""
    if not isinstance(given, Mapping) or not ("type" in given and isinstance(given["type"], str)):
        return
    kind, is_tool = given["type"], any(key in given for key in _TOOL_KEYS)
    has_schema = any(isinstance(given.get(key), Mapping) for key in ("parameters", "input_schema", "function"))
    if kind == "function" or (has_schema and kind.lower() in ("custom", "function", "object", "tool")):
        return
    if not is_tool and ("title" in given or kind in TYPES):
        return
    raise ValueError(f"a tool's type is function, not {kind!r:.80}: a provider's own tools do not run here")


def _is_titled_schema(given: Any) -> bool:
    return isinstance(given, dict) and "title" in given and not any(key in given for key in _TOOL_KEYS)


def _root_is_not_object(given: Any) -> bool:
    if not (isinstance(given, type) and is_basemodel_subclass(given)):
        return False
    schema = _schema_of(given)
    return not is_object(schema) or "properties" not in schema


def _is_pydantic_only_type(given: Any) -> bool:
    """A type that pydantic can describe and LangChain's conversion treats as a function or refuses."""
    if is_typeddict(given):
        return not _langchain_converts(given)
    if get_origin(given) is not None:
        return True
    plain = isinstance(given, type) and not is_basemodel_subclass(given) and not is_dataclass(given)
    return plain and (issubclass(given, Enum) or given.__module__ == "builtins")


def _langchain_converts(given: Any) -> bool:
    try:
        convert_to_json_schema(given)
    except _FAILURES:  # it holds itself, or has Required
        return False
    return True


def _name_of(given: Any) -> str:
    name = getattr(given, "__name__", None)
    return name if isinstance(name, str) else "reply"


def _schema_of(given: Any) -> dict[str, Any]:
    if isinstance(given, type) and issubclass(given, BaseModel):
        return given.model_json_schema()
    if hasattr(given, "schema"):  # a class of pydantic 1
        return dict(given.schema())
    return TypeAdapter(given).json_schema()


def _schema_to_keep(given: Any) -> dict[str, Any] | None:
    """The schema of a class, tool or function if LangChain cannot inline its references; else None."""
    source: Any = given
    if isinstance(given, BaseTool):
        source = given.tool_call_schema
    elif callable(given) and not isinstance(given, type):
        source = StructuredTool.from_function(given).tool_call_schema if given.__doc__ else None
    if source is not given and isinstance(source, dict):  # a tool of an MCP server
        schema = source
    elif isinstance(source, type) and is_basemodel_subclass(source):
        schema = _schema_of(source)
    else:
        return None
    return schema if _has_no_inlined_form(schema) else None


def _has_no_inlined_form(schema: Mapping[str, Any]) -> bool:
    """Whether a reference leads to a schema that holds it, to an anchor, to another document or nowhere."""
    open_nodes, done = set[int](), set[int]()
    waiting: list[tuple[Any, bool]] = [(schema, True)]
    while waiting:
        here, entering = waiting.pop()
        if not entering:
            open_nodes.discard(id(here))
            done.add(id(here))
        elif id(here) in open_nodes:
            return True
        elif isinstance(here, Mapping | list) and id(here) not in done:
            open_nodes.add(id(here))
            below = list(here.values()) if isinstance(here, Mapping) else here
            if isinstance(here, Mapping) and "$ref" in here:
                reference = str(here["$ref"])  # no text where it is a property of that name
                target = follow_pointer(schema, reference) if f"{reference}/".startswith("#/") else None
                if target is None:
                    return True
                below = [*below, target]
            waiting += [(here, False), *((each, True) for each in below)]
    return False


def _without_titles(node: Any) -> Any:
    """A schema without the titles that pydantic generates from names, as LangChain does it."""
    if isinstance(node, list):
        return [_without_titles(each) for each in node]
    if not isinstance(node, Mapping):
        return node
    return {key: _without_titles(each) for key, each in node.items() if not (key == "title" and isinstance(each, str))}
