"""Response options of one call: tools, tool choice and response format, in all of OpenAI's spellings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from typing import Any, get_args

from langchain_core.messages import BaseMessage, SystemMessage

from ..errors import BadSchema, ConfigError
from ..formats.tool_calls import PlainTextParser, ToolCallParser
from ..grammar.grammar import CompiledGrammar, json_grammar, tool_grammar
from ..grammar.lark_rules import Choice, arguments_of, functions_of, reply_of
from ..grammar.validation import SchemaValidator
from ..grammar.vocabulary import Vocabulary
from .schema_conversion import json_schema, openai_tool

_CHOICES: tuple[Choice, ...] = get_args(Choice)
_NOT_PARALLEL = "disable_parallel_tool_use"
_CHOICE_KEYS = ("type", "name", "function", "tool", _NOT_PARALLEL)
"""Of OpenAI's, Anthropic's and Bedrock's mappings."""
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


@dataclass(frozen=True)
class ResponseOptions:
    """The arguments of one call that constrain its output.

    Attributes:
        tools: in OpenAI's form.
        tool_choice: "auto", "any" or "none".
        tool: name of the one tool to call, with ``tool_choice`` "any"; None names no tool.
        parallel: whether one answer may hold several tool calls; never of a ``tool`` that is named.
        reply: JSON schema of an answer that is not a tool call; None permits any text.
        schema_in_prompt: whether the prompt shows ``reply``; not with "json_object", which the user describes.
    """

    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: Choice = "auto"
    tool: str | None = None
    parallel: bool = True
    reply: Mapping[str, Any] | None = None
    schema_in_prompt: bool = False

    @classmethod
    def of(cls, call: Mapping[str, Any]) -> ResponseOptions:
        """Read ``tools``, ``tool_choice``, ``parallel_tool_calls`` and ``response_format``.

        ``parallel_tool_calls``, else Anthropic's ``disable_parallel_tool_use`` in the tool choice, says whether there
        may be several calls. By default "any" permits one: where only calls are legal, small models do not stop.
        A choice that names a tool is one call of it whatever they say, as OpenAI has it.

        Raises:
            ConfigError: an unknown tool choice or response format.
            BadSchema: a tool that is not in OpenAI's form.
        """
        tools = tuple(call.get("tools") or ())
        for tool in tools:
            if not isinstance(tool, Mapping):
                raise BadSchema(
                    f"tools holds a {type(tool).__name__}; a call takes OpenAI's form alone.",
                    hint="Use bind_tools([...]), which takes functions, tools and classes.",
                )
        choice, tool = parse_tool_choice(call.get("tool_choice"))
        parallel = call.get("parallel_tool_calls")
        if parallel is None:
            parallel = _parallel_in(call.get("tool_choice"))
        reply, schema_in_prompt = _parse_response_format(call.get("response_format"))
        return cls(
            tools=tools,
            tool_choice=choice,
            tool=tool,
            parallel=choice == "auto" if parallel is None else bool(parallel),
            reply=reply,
            schema_in_prompt=schema_in_prompt,
        )

    @property
    def cache_key(self) -> str:
        """Equal for options with the same grammar."""
        return json.dumps(
            [self.tools, self.tool_choice, self.tool, self.parallel, self.reply], sort_keys=True, default=str
        )

    def check(self) -> None:
        """Validate tools and schemas without a model.

        Raises:
            BadSchema: a malformed tool, or a schema that no grammar can express.
            ConfigError: a tool choice that fits no tool.
        """
        for function in functions_of(self.tools).values():
            arguments_of(function)
        self._callable_tools()
        if self.reply is not None:
            reply_of(self.reply)

    def compile(self, vocabulary: Vocabulary) -> CompiledGrammar:
        """Compile the grammar; without tools and response schema it permits any text that is not blank.

        Raises:
            BadSchema, ConfigError: as ``check``.
        """
        if self.reply is not None and not self.may_call:
            return json_grammar(vocabulary, self.reply)
        several = self.parallel and self.tool is None
        return tool_grammar(vocabulary, self._callable_tools(), self.tool_choice, parallel=several, reply=self.reply)

    def _callable_tools(self) -> Sequence[Mapping[str, Any]]:
        """The tools that may be called: all, or the one that the tool choice names.

        Raises:
            BadSchema: not a tool.
            ConfigError: the tool choice fits none.
        """
        functions = functions_of(self.tools)
        if self.tool in functions:
            return [{"type": "function", "function": functions[self.tool]}]
        if self.tool is None and (functions or self.tool_choice != "any"):
            return self.tools
        wanted = self.tool if self.tool is not None else self.tool_choice
        raise ConfigError(
            f"tool_choice={wanted!r} fits no tool (tools: {', '.join(map(repr, functions)) or 'none bound'}).",
            hint='Use "auto", "any", "none" or a tool\'s name.',
        )

    @property
    def requires_structure(self) -> bool:
        """Whether the answer must be a complete structure: a tool call, or JSON."""
        return self.reply is not None or (self.may_call and (self.tool is not None or self.tool_choice == "any"))

    @property
    def may_call(self) -> bool:
        """Whether a tool call is legal."""
        return bool(self.tools) and self.tool_choice != "none"

    @cached_property
    def schemas(self) -> OutputSchemas:
        """Validators of the finished answer.

        Raises:
            BadSchema: as ``check``.
        """
        functions = functions_of(self._callable_tools()) if self.may_call else {}
        calls = {name: arguments_of(function) for name, function in functions.items()}
        reply = reply_of(self.reply) if self.reply is not None else None
        notes = [_tool_note(name, note) for name, each in calls.items() for note in each.notes]
        return OutputSchemas(
            {name: SchemaValidator(each.whole) for name, each in calls.items()},
            SchemaValidator(reply.whole) if reply is not None else None,
            (*notes, *(reply.notes if reply is not None else ())),
        )

    def parser(self, tokenizer: Any) -> ToolCallParser | PlainTextParser:
        """A streaming parser; it looks for tool calls only where the grammar permits them."""
        if not self.may_call:
            return PlainTextParser()
        return ToolCallParser.for_tokenizer(tokenizer, after_text=self.reply is None, validate=self.schemas.call_error)

    def prompt(self, messages: Sequence[BaseMessage]) -> list[BaseMessage]:
        """The conversation, with the response schema at the end of its system message if it is to be shown."""
        if not self.schema_in_prompt:
            return list(messages)
        note = f"Give your answer as JSON that fits this schema: {json.dumps(self.reply, ensure_ascii=False)}"
        if messages and isinstance(messages[0], SystemMessage):
            system: Any = messages[0].content
            content = (
                f"{system}\n\n{note}" if isinstance(system, str) else [*system, {"type": "text", "text": f"\n\n{note}"}]
            )
            return [SystemMessage(content), *messages[1:]]
        return [SystemMessage(note), *messages] if messages else []


@dataclass(frozen=True)
class OutputSchemas:
    """Validators of a finished answer.

    Attributes:
        calls: of tool arguments, by tool name.
        reply: of an answer that is not a tool call.
        relaxed: what the grammar does not enforce, as ``path: keyword``.
    """

    calls: Mapping[str, SchemaValidator] = field(default_factory=dict)
    reply: SchemaValidator | None = None
    relaxed: tuple[str, ...] = ()

    def call_error(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Why the arguments of a call are invalid; "" if they are valid."""
        if name not in self.calls:
            return f"{name!r} is no tool that may be called"
        return self.calls[name].error_of(arguments)

    def reply_error(self, text: str) -> str:
        """Why the text of an answer is invalid; "" if it is valid, or if there is no schema."""
        if self.reply is None:
            return ""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            return f"the answer is no JSON: {error}"
        return self.reply.error_of(value)


def _tool_note(tool: str, note: str) -> str:
    return f"{tool}{note.removeprefix('(root)')}" if note.startswith("(root)") else f"{tool}.{note}"


def openai_tools(tools: Sequence[Any], *, strict: bool | None) -> list[dict[str, Any]]:
    """Functions, tools, classes and schemas in OpenAI's form.

    Args:
        tools: whatever ``convert_to_openai_tool`` takes.
        strict: make every argument required; the ``strict`` key itself is removed, so the prompt does not show it.

    Raises:
        BadSchema: not a tool.
    """
    return [openai_tool(tool, strict=strict) for tool in tools]


def parse_tool_choice(choice: Any) -> tuple[Choice, str | None]:
    """A tool choice as "auto", "any" or "none", and the name of the one tool to call.

    A plain string that is a mode is the mode; the mappings of OpenAI, Anthropic and Bedrock can name any tool, even one
    called "auto".

    Raises:
        ConfigError: a mapping that names neither a mode nor a tool, or has a key of no provider's.
    """
    if isinstance(choice, Mapping):
        named = choice.get("function", choice.get("tool", choice))
        if isinstance(named, Mapping) and isinstance(named.get("name"), str):
            _check_keys(choice)
            return "any", named["name"]
        kind = choice.get("type", *(choice if len(choice) == 1 else ()))  # Bedrock's {"any": {}}
        if kind in ("required", *_CHOICES):
            _check_keys(choice)
            return parse_tool_choice(kind)
        hint = 'Use "auto", "any", "none" or a tool\'s name.'
        if kind == "allowed_tools":
            hint = "Bind only the tools that are allowed."
        raise ConfigError(f"This is no tool_choice: {choice!r:.200}.", hint=hint)
    if choice is None or isinstance(choice, bool):
        return "any" if choice else "auto", None
    word = "any" if choice == "required" else str(choice)
    return next(((mode, None) for mode in _CHOICES if mode == word), ("any", word))


def _check_keys(choice: Mapping[Any, Any]) -> None:
    """Refuse keys of a tool choice that would have no effect (ConfigError)."""
    for key in choice:
        if key in _CHOICE_KEYS or len(choice) == 1:
            continue
        close = get_close_matches(str(key), _CHOICE_KEYS, n=1)
        raise ConfigError(
            f"tool_choice takes no {key!r:.80}.", hint=f"Did you mean {close[0]}?" if close else "Leave it out."
        )


def _parallel_in(choice: Any) -> bool | None:
    """Whether Anthropic's mapping permits several calls; None where it does not say (ConfigError: no bool)."""
    if not isinstance(choice, Mapping) or _NOT_PARALLEL not in choice:
        return None
    given = choice[_NOT_PARALLEL]
    if not isinstance(given, bool):
        raise ConfigError(f"{_NOT_PARALLEL} is {given!r:.80}.", hint="Use True or False.")
    return not given


def with_schema(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments with a class as ``response_format`` replaced by its JSON schema, which means the same."""
    wanted = call.get("response_format")
    if not isinstance(wanted, type):
        return dict(call)
    schema = {"name": wanted.__name__, "schema": json_schema(wanted)}
    return {**call, "response_format": {"type": "json_schema", "json_schema": schema}}


def _described(schema: Mapping[str, Any], description: Any) -> Mapping[str, Any]:
    """The schema with a response format's description, before its own if that is another."""
    if not (isinstance(description, str) and description) or description == schema.get("description"):
        return schema
    both = "\n".join(text for text in (description, schema.get("description")) if isinstance(text, str))
    return {"description": both, **{key: value for key, value in schema.items() if key != "description"}}


def _parse_response_format(wanted: Any) -> tuple[Mapping[str, Any] | None, bool]:
    """The schema in an OpenAI ``response_format`` (or of a class), and whether the prompt shows it."""
    if wanted is None:
        return None, False
    if isinstance(wanted, type):
        return json_schema(wanted), True
    kind = wanted.get("type") if isinstance(wanted, Mapping) else None
    if kind == "text":
        return None, False
    if kind == "json_object":  # llama.cpp and vLLM accept a schema with it
        return wanted.get("schema") or ANY_OBJECT, False
    inner = wanted.get("json_schema") if kind == "json_schema" else None
    if isinstance(inner, Mapping) and isinstance(inner.get("schema"), Mapping):
        return _described(inner["schema"], inner.get("description")), True
    raise ConfigError(
        f"This is no response_format: {str(wanted)[:200]}.",
        hint='Use {"type": "json_schema", "json_schema": {"name": ..., "schema": ...}} or {"type": "json_object"}.',
    )
