"""What one call may answer with: tools, a tool choice, a JSON reply; read in all of OpenAI's spellings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from langchain_core.messages import BaseMessage, SystemMessage

from ..errors import ConfigError
from ..formats.tool_calls import PlainText, ToolCallParser
from ..grammar.grammar import CompiledGrammar, Vocabulary, json_grammar, tool_grammar
from ..grammar.lark_rules import CHOICES, arguments_of, functions_of, reply_of
from ..grammar.validation import Check, checked
from .schema_conversion import json_schema, openai_tool

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


@dataclass(frozen=True)
class Request:
    """The arguments of one call that say what is legal.

    Attributes:
        tools: in OpenAI's form.
        tool_choice: "auto", "any" or "none".
        tool: name of the one tool to call, which goes before ``tool_choice``; None leaves it open.
        parallel: whether there may be several calls in one answer.
        reply: JSON schema of an answer that is no call; None permits any text.
        told: whether the prompt shows ``reply``: with "json_object" the user's own words describe it.
    """

    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: str = "auto"
    tool: str | None = None
    parallel: bool = True
    reply: Mapping[str, Any] | None = None
    told: bool = False

    @classmethod
    def of(cls, call: Mapping[str, Any]) -> Request:
        """Read ``tools``, ``tool_choice``, ``parallel_tool_calls`` and ``response_format``.

        A forced answer is one call unless ``parallel_tool_calls=True`` asks for more: small models do not know
        where to stop when only calls are legal.

        Raises:
            ConfigError: an unknown response format.
        """
        choice, tool = chosen_tool(call.get("tool_choice"))
        parallel = call.get("parallel_tool_calls")
        reply, told = _wanted_reply(call.get("response_format"))
        return cls(
            tools=tuple(call.get("tools") or ()),
            tool_choice=choice,
            tool=tool,
            parallel=choice == "auto" if parallel is None else bool(parallel),
            reply=reply,
            told=told,
        )

    @property
    def key(self) -> str:
        """Equal for requests with the same grammar."""
        return json.dumps(
            [self.tools, self.tool_choice, self.tool, self.parallel, self.reply], sort_keys=True, default=str
        )

    def check(self) -> None:
        """Find what cannot work without any model.

        Raises:
            BadSchema: a malformed tool, or a schema that no grammar can express.
            ConfigError: a tool choice that fits no tool.
        """
        for function in functions_of(self.tools, "auto").values():
            arguments_of(function)
        functions_of(self._callable, self.tool_choice)
        if self.reply is not None:
            reply_of(self.reply)

    def compile(self, words: Vocabulary) -> CompiledGrammar:
        """The grammar; without tools and a reply's schema, of text that is not blank.

        Raises:
            BadSchema, ConfigError: as ``check``.
        """
        if self.reply is not None and not self.may_call:
            return json_grammar(words, self.reply)
        several = self.parallel and self.tool is None
        return tool_grammar(words, self._callable, self.tool_choice, parallel=several, reply=self.reply)

    @property
    def _callable(self) -> Sequence[Mapping[str, Any]]:
        """The tools that may be called: all, or the one that was named."""
        if self.tool is None:
            return self.tools
        named = functions_of(self.tools, "auto")
        if self.tool in named:
            return [{"type": "function", "function": named[self.tool]}]
        raise ConfigError(
            f"tool_choice={self.tool!r} fits no tool (tools: {', '.join(map(repr, named)) or 'none bound'}).",
            hint='Use "auto", "any", "none" or a tool\'s name.',
        )

    @property
    def formal(self) -> bool:
        """Whether the answer has a form that must be whole: a call, or JSON."""
        return self.reply is not None or (self.may_call and (self.tool is not None or self.tool_choice == "any"))

    @property
    def may_call(self) -> bool:
        """Whether a tool call is legal."""
        return bool(self.tools) and self.tool_choice != "none"

    @cached_property
    def checks(self) -> Checks:
        """What the finished answer is held to.

        Raises:
            BadSchema: as ``check``.
        """
        functions = functions_of(self._callable, "auto") if self.may_call else {}
        calls = {name: arguments_of(function) for name, function in functions.items()}
        reply = reply_of(self.reply) if self.reply is not None else None
        notes = [_note(name, note) for name, each in calls.items() for note in each.notes]
        return Checks(
            {name: checked(each.whole) for name, each in calls.items()},
            checked(reply.whole) if reply is not None else None,
            (*notes, *(reply.notes if reply is not None else ())),
        )

    def parser(self, tokenizer: Any) -> ToolCallParser | PlainText:
        """Reads an answer as the grammar means it: a JSON reply holds no calls, whatever its strings say."""
        if not self.may_call:
            return PlainText()
        return ToolCallParser.for_tokenizer(tokenizer, after_text=self.reply is None, complaint=self.checks.of_call)

    def prompt(self, messages: Sequence[BaseMessage]) -> list[BaseMessage]:
        """The conversation, with the reply's schema at the end of its system message."""
        if not self.told:
            return list(messages)
        note = f"Give your answer as JSON that fits this schema: {json.dumps(self.reply, ensure_ascii=False)}"
        if messages and isinstance(messages[0], SystemMessage):
            said: Any = messages[0].content
            content = f"{said}\n\n{note}" if isinstance(said, str) else [*said, {"type": "text", "text": f"\n\n{note}"}]
            return [SystemMessage(content), *messages[1:]]
        return [SystemMessage(note), *messages] if messages else []


@dataclass(frozen=True)
class Checks:
    """The schemas that a finished answer is held to.

    Attributes:
        calls: of arguments, by the tool's name.
        reply: of an answer that is no call.
        relaxed: what the grammar does not enforce, as ``place: keyword``.
    """

    calls: Mapping[str, Check] = field(default_factory=dict)
    reply: Check | None = None
    relaxed: tuple[str, ...] = ()

    def of_call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Why the arguments of a call do not fit; "" where they do."""
        if name not in self.calls:
            return f"{name!r} is no tool that may be called"
        return self.calls[name].complaint(arguments)

    def of_reply(self, text: str) -> str:
        """Why a reply's text does not fit; "" where it does, or where any text does."""
        if self.reply is None:
            return ""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            return f"the answer is no JSON: {error}"
        return self.reply.complaint(value)


def _note(tool: str, note: str) -> str:
    return f"{tool}{note.removeprefix('(root)')}" if note.startswith("(root)") else f"{tool}.{note}"


def openai_tools(tools: Sequence[Any], *, strict: bool | None) -> list[dict[str, Any]]:
    """Functions, tools, classes and schemas in OpenAI's form.

    Args:
        tools: whatever ``convert_to_openai_tool`` takes.
        strict: make every argument required. No mark of it stays: the prompt shows the tool alone.

    Raises:
        BadSchema: something that is no tool.
    """
    return [openai_tool(tool, strict=strict) for tool in tools]


def chosen_tool(choice: Any) -> tuple[str, str | None]:
    """A tool choice as "auto", "any" or "none", and the name of the one tool to call.

    A bare word is the mode where it is one; OpenAI's mapping names any tool, also one that is called "auto".
    """
    if isinstance(choice, Mapping):
        named = choice.get("function", choice)
        name = named.get("name") if isinstance(named, Mapping) else None
        return ("any", str(name)) if name is not None else chosen_tool(choice.get("type"))
    if choice is None or isinstance(choice, bool):
        return "any" if choice else "auto", None
    word = "any" if choice == "required" else str(choice)
    return (word, None) if word in CHOICES else ("any", word)


def _wanted_reply(wanted: Any) -> tuple[Mapping[str, Any] | None, bool]:
    """The schema in an OpenAI ``response_format`` (or a class in its place), and whether the prompt shows it."""
    if wanted is None:
        return None, False
    if isinstance(wanted, type):
        return json_schema(wanted), True
    kind = wanted.get("type") if isinstance(wanted, Mapping) else None
    if kind == "text":
        return None, False
    if kind == "json_object":  # a schema beside it is llama.cpp's and vLLM's way
        return wanted.get("schema") or ANY_OBJECT, False
    inner = wanted.get("json_schema") if kind == "json_schema" else None
    if isinstance(inner, Mapping) and isinstance(inner.get("schema"), Mapping):
        return inner["schema"], True
    raise ConfigError(
        f"This is no response_format: {str(wanted)[:200]}.",
        hint='Use {"type": "json_schema", "json_schema": {"name": ..., "schema": ...}} or {"type": "json_object"}.',
    )
