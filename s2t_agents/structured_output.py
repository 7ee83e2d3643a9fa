"""``with_structured_output``: a model whose answers are objects, by a forced tool call or by a forced JSON reply."""

from __future__ import annotations

from operator import itemgetter
from typing import Any, Literal

from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.output_parsers import BaseOutputParser, JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass

from .errors import BadSchema, ConfigError
from .models.loading import first_line

Method = Literal["function_calling", "json_schema", "json_mode"]


def structured(
    model: BaseChatModel,
    schema: dict[str, Any] | type | None,
    *,
    method: Method,
    include_raw: bool,
    strict: bool | None,
) -> Runnable[LanguageModelInput, Any]:
    """The model followed by a parser; the grammar holds the answer to the schema with every method.

    Args:
        model: must take ``bind_tools`` and ``response_format``.
        schema: a pydantic class (of version 1 too), a TypedDict or a JSON schema; None is any object, for "json_mode".
        method: "function_calling" shows the schema as a tool and forces one call of it; "json_schema" shows it in the
            system message; "json_mode" leaves it to the user's own words.
        include_raw: return ``{"raw", "parsed", "parsing_error"}`` and raise nothing.
        strict: make every property required, as OpenAI's strict mode does ("function_calling", "json_schema").

    Raises:
        ConfigError: an unknown method, or no schema where one is needed.
        BadSchema: something that is no schema, or that no grammar can express.
    """
    if method not in ("function_calling", "json_schema", "json_mode"):
        raise ConfigError(f"method={method!r} is unknown.", hint="Use function_calling, json_schema or json_mode.")
    if schema is None and method != "json_mode":
        raise ConfigError(f"method={method!r} needs a schema.", hint='Only "json_mode" takes none.')
    if schema is None:
        return _parsed(model.bind(response_format={"type": "json_object"}), JsonOutputParser(), include_raw)
    told = {"kwargs": {"method": method, "strict": strict}, "schema": _json_schema(schema, None)}
    if method == "function_calling":
        name = convert_to_openai_tool(schema)["function"]["name"]
        only: Any = {"type": "function", "function": {"name": name}}
        bound = model.bind_tools([schema], tool_choice=only, strict=strict, ls_structured_output_format=told)
        return _parsed(bound, _call_parser(schema, name), include_raw)
    wanted = _json_schema(schema, strict)
    response_format = (
        {"type": "json_object", "schema": wanted}
        if method == "json_mode"
        else {"type": "json_schema", "json_schema": {"name": wanted.get("title", "reply"), "schema": wanted}}
    )
    bound = model.bind_tools([], response_format=response_format, ls_structured_output_format=told)
    return _parsed(bound, _text_parser(schema), include_raw)


def _json_schema(schema: dict[str, Any] | type, strict: bool | None) -> dict[str, Any]:
    try:
        return convert_to_json_schema(schema, strict=strict)
    except (ValueError, TypeError, KeyError) as error:
        raise BadSchema(
            f"This is no output schema: {str(schema)[:200]} ({first_line(error)}).",
            hint='Give a pydantic class, a TypedDict or a JSON schema with a "title".',
        ) from error


def _call_parser(schema: dict[str, Any] | type, name: str) -> Runnable[Any, Any]:
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        return PydanticToolsParser(tools=[schema], first_tool_only=True)
    return JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)


def _text_parser(schema: dict[str, Any] | type) -> BaseOutputParser[Any]:
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        return PydanticOutputParser(pydantic_object=schema)
    return JsonOutputParser()


def _parsed(bound: Runnable[Any, Any], parser: Runnable[Any, Any], include_raw: bool) -> Runnable[Any, Any]:
    if not include_raw:
        return bound | parser
    read = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=bound) | read.with_fallbacks([failed], exception_key="parsing_error")
