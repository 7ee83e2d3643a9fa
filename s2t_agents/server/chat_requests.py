"""Requests of ``/v1/chat/completions``: from OpenAI's JSON to LangChain messages and arguments of ``ChatS2T``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    FunctionMessage,
    HumanMessage,
    InvalidToolCall,
    SystemMessage,
    ToolCall,
    ToolMessage,
)
from pydantic import Field, field_validator, model_validator
from pydantic_core import from_json

from ..errors import BadRequest
from ..tokenization.chat_template import NOT_VARIABLES
from ..types import MAX_LOGPROBS
from .parameters import Parameters, Part, SamplingParameters, parse

MAX_PARTS = 10_000
"""Messages of a conversation; and their parts and calls, together."""
MAX_TEMPLATE_ARGS = 32

_DROPPED_WITH_MESSAGE = frozenset({"annotations", "audio", "function_call"})
"""Keys of an answer that clients send back with it, where they are empty."""


class ContentPart(Part):
    """One part of a message's content; others than text are refused, which no field here can hold."""

    type: str
    text: str | None = None
    refusal: str | None = None


class CalledFunction(Part):
    """Name and arguments (JSON) of a call in the history."""

    name: str = Field(min_length=1)
    arguments: str = "{}"


class HistoryCall(Part):
    """A tool call in the history."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatTurn(Parameters):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[ContentPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[HistoryCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_empty_keys(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {
            name: value
            for name, value in given.items()
            if value is not None and not (name in _DROPPED_WITH_MESSAGE and not value)
        }

    def message(self, where: str) -> BaseMessage:
        """As LangChain's message.

        Raises:
            BadRequest: content that is no text, or fields that the role does not have.
        """
        self._check_fields(where)
        text = self._text(where)
        if self.role in ("system", "developer"):
            return SystemMessage(text, name=self.name)
        if self.role == "user":
            return HumanMessage(text, name=self.name)
        if self.role == "tool":
            return ToolMessage(text, tool_call_id=self.tool_call_id or "", name=self.name)
        if self.role == "function":
            return FunctionMessage(content=text, name=self.name or "")
        calls = [_call_of(each) for each in self.tool_calls or ()]
        return AIMessage(
            content=text or self.refusal or "",
            name=self.name,
            additional_kwargs={"reasoning_content": self.reasoning_content} if self.reasoning_content else {},
            tool_calls=[each for each in calls if each["type"] == "tool_call"],
            invalid_tool_calls=[each for each in calls if each["type"] == "invalid_tool_call"],
        )

    def _check_fields(self, where: str) -> None:
        required = {"tool": "tool_call_id", "function": "name"}.get(self.role)
        if required is not None and not getattr(self, required):
            raise BadRequest(
                f"{where} has no {required}.", param=f"{where}.{required}", code="missing_required_parameter"
            )
        if self.content is None and self.role != "assistant":
            raise BadRequest(f"{where} has no content.", param=f"{where}.content", code="missing_required_parameter")
        own = {"assistant": ("tool_calls", "refusal", "reasoning_content"), "tool": ("tool_call_id",)}.get(
            self.role, ()
        )
        for name in ("tool_calls", "refusal", "reasoning_content", "tool_call_id"):
            if name not in own and getattr(self, name) is not None:
                raise BadRequest(
                    f"{where} has {name}, which a message of {self.role!r} does not have.",
                    param=f"{where}.{name}",
                    code="invalid_value",
                )

    def _text(self, where: str) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(_text_of(part, f"{where}.content.{at}") for at, part in enumerate(self.content))


def _text_of(part: ContentPart, where: str) -> str:
    text = {"text": part.text, "refusal": part.refusal}.get(part.type)
    if text is None:
        raise BadRequest(
            f"{where} is a part of type {part.type!r:.60} without text.",
            param=where,
            code="unsupported_content",
            hint="This model reads text alone.",
        )
    return text


def _call_of(call: HistoryCall) -> ToolCall | InvalidToolCall:
    """Arguments that are not a JSON object stay as they are, in an invalid call."""
    name, written = call.function.name, call.function.arguments
    try:
        arguments = from_json(written.strip() or "{}", allow_inf_nan=False)
    except ValueError:
        arguments = None
    if isinstance(arguments, dict):
        return ToolCall(name=name, args=arguments, id=call.id, type="tool_call")
    return InvalidToolCall(name=name, args=written, id=call.id, error=None, type="invalid_tool_call")


class ToolFunction(Parameters):
    """A function that may be called; ``strict`` changes nothing: schemas are enforced in any case."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class OfferedTool(Parameters):
    """A tool that may be called."""

    type: Literal["function"]
    function: ToolFunction


class NamedFunction(Parameters):
    """The function of a tool choice."""

    name: str


class NamedTool(Parameters):
    """A tool choice that names one tool."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Parameters):
    """The schema of a response format; ``strict`` changes nothing: it is enforced in any case."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Parameters):
    """The form of an answer; ``schema`` beside ``json_object`` as llama.cpp and vLLM take it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema, which needs it")
        if self.schema_ is not None and self.type != "json_object":
            raise ValueError("schema belongs to the type json_object")
        return self


class ChatRequest(SamplingParameters):
    """A request for a chat completion.

    ``max_thinking_tokens`` and ``chat_template_kwargs`` (flags and numbers alone: texts would be trusted as the
    template's own) are not OpenAI's.
    """

    messages: list[ChatTurn] = Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31)
    max_thinking_tokens: int | None = Field(default=None, ge=0, le=2**31)
    chat_template_kwargs: dict[str, bool | int | float | None] | None = None
    tools: Annotated[list[OfferedTool], Field(max_length=1024, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @field_validator("chat_template_kwargs", mode="before")
    @classmethod
    def _few_and_variables(cls, given: Any) -> Any:
        """Before each is looked at: ``max_length`` of a mapping comes after."""
        if not isinstance(given, dict):
            return given
        if len(given) > MAX_TEMPLATE_ARGS:
            raise ValueError(f"it has {len(given)} entries; at most {MAX_TEMPLATE_ARGS} are taken")
        if reserved := sorted(NOT_VARIABLES & given.keys()):
            raise ValueError(f"{', '.join(reserved)} cannot be given to a template")
        return given

    def langchain_messages(self) -> list[BaseMessage]:
        """The conversation.

        Raises:
            BadRequest: as ``ChatTurn.message``.
        """
        return [turn.message(f"messages.{at}") for at, turn in enumerate(self.messages)]

    def offered_tools(self) -> Sequence[dict[str, Any]]:
        """The tools in OpenAI's form."""
        return [each.model_dump(exclude_none=True) for each in self.tools or ()]

    def call_arguments(self) -> dict[str, Any]:
        """Arguments of a call of ``ChatS2T``, without tools, stop strings and who asks."""
        choice, wanted = self.tool_choice, self.response_format
        found = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "max_tokens": self.max_completion_tokens or self.max_tokens,
            "max_thinking_tokens": self.max_thinking_tokens,
            "template_args": self.chat_template_kwargs,
            "tool_choice": choice.model_dump() if isinstance(choice, NamedTool) else choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "logprobs": self.logprobs,
            "top_logprobs": self.top_logprobs,
            "response_format": wanted.model_dump(by_alias=True, exclude_none=True) if wanted is not None else None,
        }
        return {name: value for name, value in found.items() if value is not None}


def chat_request(body: dict[str, Any]) -> ChatRequest:
    """A request for a chat completion.

    Raises:
        BadRequest: a parameter that is missing, malformed, unknown or not supported.
    """
    parts = _parts_of(body.get("messages"))
    if parts > MAX_PARTS:  # before each is read
        raise BadRequest(
            f"The messages have {parts} parts and calls; at most {MAX_PARTS} are taken.",
            param="messages",
            code="invalid_value",
            hint="Join texts.",
        )
    request = parse(ChatRequest, body)
    both = request.max_tokens, request.max_completion_tokens
    if None not in both and both[0] != both[1]:
        raise BadRequest("max_tokens and max_completion_tokens differ.", param="max_tokens", hint="Send the latter.")
    if request.top_logprobs is not None and not request.logprobs:
        raise BadRequest("top_logprobs needs logprobs=true.", param="top_logprobs")
    if not request.tools and request.tool_choice not in (None, "none", "auto"):
        raise BadRequest("There is a tool_choice and no tools.", param="tool_choice", hint="Send tools.")
    return request


def _parts_of(messages: Any) -> int:
    """Parts and calls of all messages, as they came."""
    turns = [each for each in messages if isinstance(each, dict)] if isinstance(messages, list) else []
    lists = [turn[name] for turn in turns for name in ("content", "tool_calls") if isinstance(turn.get(name), list)]
    return sum(map(len, lists))
