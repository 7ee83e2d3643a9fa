"""``with_structured_output``: answers as objects, by a forced tool call or a forced JSON reply."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from functools import partial
from operator import itemgetter
from typing import Any, Literal

from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.output_parsers import BaseCumulativeTransformOutputParser, BaseOutputParser, JsonOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser
from langchain_core.outputs import Generation
from langchain_core.runnables import (
    Runnable,
    RunnableGenerator,
    RunnableLambda,
    RunnableMap,
    RunnablePassthrough,
)
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel

from ..errors import ConfigError
from .schema_conversion import VALUE_ARGUMENT, is_object, json_schema, openai_tool, wrap_in_object

Method = Literal["function_calling", "json_schema", "json_mode"]


def structured(
    model: BaseChatModel,
    schema: dict[str, Any] | type | None,
    *,
    method: Method,
    include_raw: bool,
    strict: bool | None,
) -> Runnable[LanguageModelInput, Any]:
    """The model followed by a parser; with every method the grammar constrains the answer to the schema.

    Args:
        model: must support ``bind_tools`` and ``response_format``.
        schema: a pydantic class (of version 1 too), a TypedDict, another type that pydantic knows (``list[int]``, an
            Enum, a Literal: the answer is its JSON value) or a JSON schema; None is any object, for "json_mode".
        method: "function_calling" gives the schema as a tool and forces one call of it; "json_schema" shows it in the
            system message; "json_mode" does not show it.
        include_raw: return ``{"raw", "parsed", "parsing_error"}``; an answer that does not fit is in "parsing_error",
            and raises nothing when invoked.
        strict: make every property required, as OpenAI's strict mode does ("function_calling", "json_schema").

    The finished answer is validated against the whole schema; if it is invalid, or its class refuses it, the parser
    raises LangChain's ``OutputParserException`` with the reason. A stream shows what is parsed so far: an answer that
    does not fit raises at its end if the schema says so, but one that only the class refuses gives no object, as in
    LangChain's own parsers, and a stream with ``include_raw`` raises. A schema whose values are not objects becomes the
    one argument of the tool.

    Raises:
        ConfigError: an unknown method, or no schema where one is needed.
        BadSchema: not a schema, or one that no answer can fit.
    """
    if method not in ("function_calling", "json_schema", "json_mode"):
        raise ConfigError(f"method={method!r} is unknown.", hint="Use function_calling, json_schema or json_mode.")
    if schema is None and method != "json_mode":
        raise ConfigError(f"method={method!r} needs a schema.", hint='Only "json_mode" takes none.')
    if schema is None:
        return _with_parser(model.bind(response_format={"type": "json_object"}), JsonOutputParser(), include_raw)
    wanted = json_schema(schema, strict=strict)
    ls_format = {"kwargs": {"method": method, "strict": strict}, "schema": json_schema(schema)}
    if method == "function_calling":
        return _by_tool_call(model, schema, wanted, include_raw, strict, ls_format)
    response_format = (
        {"type": "json_object", "schema": wanted}
        if method == "json_mode"
        else {"type": "json_schema", "json_schema": {"name": wanted.get("title", "reply"), "schema": wanted}}
    )
    bound = model.bind_tools([], response_format=response_format, ls_structured_output_format=ls_format)
    return _with_parser(bound, _text_parser(schema), include_raw)


def _by_tool_call(
    model: BaseChatModel,
    schema: dict[str, Any] | type,
    wanted: dict[str, Any],
    include_raw: bool,
    strict: bool | None,
    ls_format: dict[str, Any],
) -> Runnable[LanguageModelInput, Any]:
    """The answer as the arguments of a forced tool call; a value that is not an object is wrapped in one argument."""
    tool: Any = schema
    parser: Runnable[Any, Any]
    if is_object(wanted):
        tool = openai_tool(schema, strict=strict)
        name = tool["function"]["name"]
        parser = _call_parser(schema, name)
    else:
        name = wanted["title"]
        described = {"name": name, "description": wanted.get("description", "")}
        tool = {"type": "function", "function": {**described, "parameters": wrap_in_object(wanted)}}
        parser = JsonOutputKeyToolsParser(key_name=name, first_tool_only=True) | RunnableLambda(
            partial(_wrapped_value, schema)
        )
    only: Any = {"type": "function", "function": {"name": name}}
    bound = model.bind_tools([tool], tool_choice=only, ls_structured_output_format=ls_format)
    return _with_parser(bound, parser, include_raw)


def _wrapped_value(schema: dict[str, Any] | type, arguments: dict[str, Any] | None) -> Any:
    value = (arguments or {}).get(VALUE_ARGUMENT)
    return _parse_json_value(schema, value) if _is_class(schema) else value


def _is_class(schema: Any) -> bool:
    return isinstance(schema, type) and is_basemodel_subclass(schema)


def _parse_json_value(schema: Any, value: Any) -> Any:
    """Parse a JSON value as an object of a pydantic class.

    It is validated as JSON text: a strict class accepts dates, sets and enums from JSON but not from Python values.

    Raises:
        OutputParserException: the class refuses the value.
    """
    text = json.dumps(value)
    try:
        return schema.model_validate_json(text) if issubclass(schema, BaseModel) else schema.parse_raw(text)
    except ValueError as error:
        raise OutputParserException(f"{schema.__name__} refuses the answer {text}: {error}", llm_output=text) from error


class _CallParser(JsonOutputKeyToolsParser):
    """The arguments of the first call as an object of the class; None while they are incomplete."""

    schema_class: Any

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        arguments = super().parse_result(result, partial=partial)
        return None if arguments is None else _parse_or_none(self.schema_class, arguments, partial)


class _ReplyParser(BaseCumulativeTransformOutputParser[Any]):
    """A JSON reply as an object of the class; None while it is incomplete."""

    schema_class: Any

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        try:
            value = JsonOutputParser().parse_result(result)
        except OutputParserException:
            if partial:
                return None
            raise
        return _parse_or_none(self.schema_class, value, partial)

    def parse(self, text: str) -> Any:
        return self.parse_result([Generation(text=text)])


def _parse_or_none(schema_class: Any, value: Any, partial: bool) -> Any:
    try:
        return _parse_json_value(schema_class, value)
    except OutputParserException:
        if partial:
            return None
        raise


def _call_parser(schema: dict[str, Any] | type, name: str) -> Runnable[Any, Any]:
    if _is_class(schema):
        return _CallParser(key_name=name, first_tool_only=True, schema_class=schema)
    return JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)


def _text_parser(schema: dict[str, Any] | type) -> BaseOutputParser[Any]:
    return _ReplyParser(schema_class=schema) if _is_class(schema) else JsonOutputParser()


def _with_parser(bound: Runnable[Any, Any], parser: Runnable[Any, Any], include_raw: bool) -> Runnable[Any, Any]:
    checked = RunnableGenerator(_raise_if_invalid, _araise_if_invalid) | parser
    if not include_raw:
        return bound | checked
    read = RunnablePassthrough.assign(parsed=itemgetter("raw") | checked, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=bound) | read.with_fallbacks([failed], exception_key="parsing_error")


def _raise_if_invalid(pieces: Iterator[BaseMessage]) -> Iterator[BaseMessage]:
    """Pass the answer on; at its end raise if it does not fit the schema."""
    whole: Any = None
    for piece in pieces:
        whole = piece if whole is None else whole + piece
        yield piece
    _check_message(whole)


async def _araise_if_invalid(pieces: AsyncIterator[BaseMessage]) -> AsyncIterator[BaseMessage]:
    whole: Any = None
    async for piece in pieces:
        whole = piece if whole is None else whole + piece
        yield piece
    _check_message(whole)


def _check_message(message: Any) -> None:
    if not isinstance(message, AIMessage):
        return
    wrong = message.response_metadata.get("s2t", {}).get("invalid", ())
    wrong = [*wrong, *(str(call["error"]) for call in message.invalid_tool_calls if call["error"])]
    if wrong or message.invalid_tool_calls:
        reason = wrong[0] if wrong else "the call is not whole"
        calls = [*message.tool_calls, *message.invalid_tool_calls]
        raise OutputParserException(
            f"The answer does not fit its schema: {reason}.", llm_output=message.text or str(calls)
        )
