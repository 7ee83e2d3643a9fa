"""LangChain messages to chat template turns to token ids.

``to_template`` makes the turns; ``PromptEncoder`` renders them with the model's chat template and encodes the result so
that no text from outside becomes a control token (``tokenization.safe_encoding``). For templates without Hermes tool
calls, tools, calls and results are put in as text (``hermes_tools``), so that one parser and one grammar serve all.

All given text is in the rendered prompt: if the template drops some of it or refuses the conversation, stricter forms
are tried (``template_fallbacks``); if none renders everything, the conversation is refused.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from ..errors import ConfigError, ContextOverflow, InputError
from ..formats.reasoning import ReasoningFormat, reasoning_variable, split_reasoning, tag_pairs
from ..formats.tool_calls import CLOSE, OPEN
from ..tokenization.chat_template import ChatTemplate
from ..tokenization.safe_encoding import SafeEncoder
from ..tokenization.traced_text import Sources, check_text
from . import content_blocks, hermes_tools, template_fallbacks

Turn = hermes_tools.Turn

_ROLES = (
    (SystemMessage, "system"),
    (HumanMessage, "user"),
    (AIMessage, "assistant"),
    (ToolMessage, "tool"),
    (FunctionMessage, "tool"),
)
_ROLE_ALIASES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "ai": "assistant",
}
_Calls = dict[str, list[tuple[str, str]]]
"""LangChain's id of a tool call (some providers reuse ids) to our ids and tool names of the calls without a result."""


def to_template(messages: Sequence[BaseMessage]) -> list[Turn]:
    """Turns as Hugging Face chat templates read them: role, content (always text), tool_calls, tool_call_id, name.

    Call ids are renumbered in order (``call00001``: nine letters and digits, which some templates require), so that a
    prompt does not change with random ids. Arguments that are not JSON are kept under ``invalid_arguments``.

    Raises:
        InputError: no messages; a message or content block that cannot be rendered; a tool result without a
            matching call; text that is not Unicode.
    """
    if not messages:
        raise InputError("There are no messages.", hint="Pass at least one HumanMessage.")
    calls: _Calls = {}
    numbers = itertools.count(1)
    turns: list[Turn] = []
    for at, message in enumerate(messages):
        where = _message_label(at, message)
        text = content_blocks.text_of(message, where)
        if isinstance(message, AIMessage):
            text = _without_nul(text)
        turn: Turn = {"role": _role_of(message, where), "content": check_text(text, where)}
        if isinstance(message, AIMessage):
            turn |= _calls_and_reasoning(message, calls, numbers)
        elif isinstance(message, ToolMessage):
            turn |= _tool_call_fields(message, calls, where)
        elif isinstance(message, FunctionMessage):
            turn |= _function_call_fields(message, turns, where)
        turns.append(turn)
    return turns


def _message_label(at: int, message: BaseMessage) -> str:
    return f"Message {at} ({type(message).__name__})"


def _role_of(message: BaseMessage, where: str) -> str:
    role = next((role for kind, role in _ROLES if isinstance(message, kind)), None)
    if isinstance(message, ChatMessage):
        role = _ROLE_ALIASES.get(message.role.lower())
    if role is None:
        raise InputError(f"{where} cannot be rendered.", hint="Use System-, Human-, AI- and ToolMessages.")
    return role


def _calls_and_reasoning(message: AIMessage, calls: _Calls, numbers: Iterator[int]) -> Turn:
    """Tool calls and reasoning of an assistant turn; records the calls in ``calls`` under their original ids."""
    entered: _Calls = {}
    tool_calls = []
    for call_id, name, args in content_blocks.calls_of(message):
        own = f"call{next(numbers):05d}"
        entered.setdefault(own if call_id is None else call_id, []).append((own, name))
        function = {"name": name, "arguments": _without_nul(args)}
        tool_calls.append({"type": "function", "id": own, "function": function})
    calls |= entered  # a reused id refers to this turn's call from here on
    thought = _without_nul(content_blocks.reasoning_of(message))
    return ({"tool_calls": tool_calls} if tool_calls else {}) | ({"reasoning_content": thought} if thought else {})


def _without_nul(value: Any) -> Any:
    """What a model wrote, without NUL characters: it may write them, and no prompt can hold them."""
    if isinstance(value, str):
        return value.replace("\0", "")
    if isinstance(value, Mapping):
        return {_without_nul(key): _without_nul(item) for key, item in value.items()}
    return [_without_nul(item) for item in value] if isinstance(value, list | tuple) else value


def _tool_call_fields(message: ToolMessage, calls: _Calls, where: str) -> Turn:
    """Id and tool name of a result; calls that share an id are matched in order."""
    if message.tool_call_id not in calls:
        known = ", ".join(map(repr, calls)) or "none at all"
        raise InputError(
            f"{where} answers tool call {message.tool_call_id!r}, which no earlier AIMessage made (calls: {known}).",
            hint="Keep the AIMessage with that call in the history.",
        )
    same = calls[message.tool_call_id]
    own, name = same.pop(0) if len(same) > 1 else same[0]
    return {"tool_call_id": own, "name": message.name or name}


def _function_call_fields(message: FunctionMessage, turns: Sequence[Turn], where: str) -> Turn:
    """Id and name of a legacy function result: it answers the first open call in the last turn that calls it."""
    for turn in reversed(turns):
        made = [call["id"] for call in turn.get("tool_calls", ()) if call["function"]["name"] == message.name]
        if made:
            answered = {turn.get("tool_call_id") for turn in turns}
            return {
                "tool_call_id": next((own for own in made if own not in answered), made[-1]),
                "name": message.name,
            }
    raise InputError(
        f"{where} answers a call of {message.name!r}, which no earlier AIMessage made.",
        hint="Keep the AIMessage with that call in the history.",
    )


@dataclass(frozen=True)
class RenderedConversation:
    """A conversation in a form that the template renders completely.

    Attributes:
        turns: for ``apply_chat_template``: the given ones, or others with the same text.
        tools: likewise; empty if the tools are text in the system turn.
        rendered: the rendered prompt, a ``TracedStr``: the origin of each character is known.
    """

    turns: list[Turn]
    tools: list[Any]
    rendered: str


class PromptEncoder:
    """Messages and tools to token ids, by a chat template.

    Args:
        tokenizer: a fast Hugging Face tokenizer with a chat template.
        template_args: additional template variables, such as ``{"enable_thinking": False}``. Text in them is trusted:
            control tokens in it are encoded as control tokens.
        chat_template: source that replaces the tokenizer's template.

    Raises:
        ConfigError: no chat template, an invalid one, or no fast tokenizer.
    """

    def __init__(
        self, tokenizer: Any, *, template_args: Mapping[str, Any] | None = None, chat_template: str | None = None
    ) -> None:
        template = chat_template or getattr(tokenizer, "chat_template", None)
        if not template:
            raise ConfigError(
                "This tokenizer has no chat template.",
                hint="Use a chat model, or give its template as chat_template=...",
            )
        if not isinstance(template, str) and not (isinstance(template, dict) and all(map(_is_str, template.values()))):
            raise ConfigError(
                f"This tokenizer's chat template is no text but {template!r:.40}.", hint="Give one as chat_template=..."
            )
        self._chat_template = chat_template
        self._tokenizer = tokenizer
        self._template_args = dict(template_args or {})
        self._encoder = SafeEncoder(tokenizer, str(template))
        self._source = str(template)
        added = {token.content for token in tokenizer.backend_tokenizer.get_added_tokens_decoder().values()}
        plain_tags = [tag for tag in hermes_tools.TAGS if f"</{tag}>" not in added]
        self._hermes_tags = hermes_tools.HermesTags(plain_tags, cut_at=["think"] if "</think>" in str(template) else [])
        self._templates: dict[str, tuple[ChatTemplate, hermes_tools.HermesTags]] = {}
        self._plain_tags = plain_tags

    def encode(
        self,
        messages: Sequence[BaseMessage],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        generation_prompt: bool = True,
        limit: int | None = None,
    ) -> list[int]:
        """Token ids of the prompt.

        Args:
            messages: the conversation.
            tools: tools in OpenAI's form, as ``convert_to_openai_tool`` makes them.
            generation_prompt: end with the opening of the assistant's turn.
            limit: maximum number of tokens; a text that cannot fit is refused before it is encoded.

        Raises:
            InputError: messages that cannot be rendered, see ``render_conversation``.
            ContextOverflow: more than ``limit`` tokens.
        """
        if limit is not None:  # cheap check before rendering
            contents = [m.content for m in messages if isinstance(m, HumanMessage | ToolMessage)]
            self._refuse_too_long([text.strip() for text in contents if isinstance(text, str)], limit)
        rendered = self.render_conversation(messages, tools, generation_prompt=generation_prompt).rendered
        if limit is not None:
            self._refuse_too_long([rendered], limit)
        ids = self._encoder.encode(rendered)
        if limit is not None and len(ids) > limit:
            raise _overflow(str(len(ids)), limit)
        return ids

    def _refuse_too_long(self, texts: Sequence[str], limit: int) -> None:
        fewest = sum(map(self._encoder.fewest_tokens, texts))
        if fewest > limit:
            raise _overflow(f"at least {fewest}", limit)

    def text_ids(self, text: str, *, limit: int | None = None) -> list[int]:
        """Token ids of a text, without control tokens.

        Args:
            text: any.
            limit: maximum number of tokens; a text that cannot fit is refused before it is encoded.

        Raises:
            InputError: text that is not Unicode.
            ContextOverflow: more than ``limit`` tokens.
        """
        if limit is not None:
            self._refuse_too_long([text], limit)
        ids = self._encoder.encode(Sources().text(text, "The text"))
        if limit is not None and len(ids) > limit:
            raise _overflow(str(len(ids)), limit)
        return ids

    def render(
        self,
        messages: Sequence[BaseMessage],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        generation_prompt: bool = True,
    ) -> str:
        """The prompt as plain text, for display; encoding it could turn text from outside into control tokens."""
        return str.__str__(self.render_conversation(messages, tools, generation_prompt=generation_prompt).rendered)

    def render_conversation(
        self,
        messages: Sequence[BaseMessage],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        generation_prompt: bool = True,
    ) -> RenderedConversation:
        """The conversation in the first form that the template accepts and renders completely.

        White space around a text, reasoning, and text before a ``</think>`` may be missing.

        Raises:
            InputError: messages that cannot be rendered, see ``to_template``; a template that refuses every form, or
                renders none completely.
        """
        try:
            return self._render_first_complete(messages, tools, generation_prompt)
        except RecursionError as error:
            raise InputError(
                "A tool or the arguments of a call are nested too deep for the chat template.",
                hint="Nest them some tens of levels deep at most.",
            ) from error

    def _render_first_complete(
        self, messages: Sequence[BaseMessage], tools: Sequence[Mapping[str, Any]], generation_prompt: bool
    ) -> RenderedConversation:
        sources = Sources()
        untraced = [self._split_reasoning(turn) for turn in to_template(messages)]
        turns = [_traced_turn(turn, sources, _message_label(at, messages[at])) for at, turn in enumerate(untraced)]
        traced_tools = [sources.value(tool, f"Tool {at}", _is_tool_text) for at, tool in enumerate(tools)]
        turns = template_fallbacks.results_by_call(turns)
        template_error, missing = None, list[str]()
        for form_turns, form_tools in self._candidate_forms(turns, traced_tools):
            try:
                rendered = self._rendered(form_turns, form_tools, generation_prompt)
            except TemplateError as error:
                template_error = template_error or error
                continue
            left_out = sources.left_out(rendered)
            if not left_out:
                _, tags = self._template(form_tools)
                return RenderedConversation(form_turns, form_tools, tags.escape_text(rendered, sources.is_framed))
            missing = missing or left_out
        if template_error is None or missing:
            raise InputError(
                f"The chat template leaves out text of: {', '.join(missing)}.",
                hint="Leave it out yourself, or use another chat template.",
            ) from template_error
        raise InputError(f"The chat template refuses these messages: {template_error}") from template_error

    def _candidate_forms(self, turns: list[Turn], tools: list[Any]) -> Iterator[tuple[list[Turn], list[Any]]]:
        """Turns and tools, from the given form to the most changed one."""
        for native in (True, False) if self.supports_hermes_tools else (False,):
            base_turns, form_tools = (turns, tools) if native else (self._hermes_tags.to_text_turns(turns, tools), [])
            first = base_turns if self.supports_system else template_fallbacks.system_in_user(base_turns)
            for form in template_fallbacks.fallback_forms(first):
                yield (
                    template_fallbacks.in_parts(self._with_reasoning(form), self._roles_read_as_parts),
                    form_tools,
                )

    def _with_reasoning(self, turns: list[Turn]) -> list[Turn]:
        """Turns with reasoning under the template's variable, or without it."""
        renamed = []
        for turn in turns:
            if "reasoning_content" in turn:
                thought = {self._reasoning_variable: turn["reasoning_content"]} if self._reasoning_variable else {}
                turn = {key: value for key, value in turn.items() if key != "reasoning_content"} | thought
            renamed.append(turn)
        return renamed

    def _template(self, tools: Sequence[Any]) -> tuple[ChatTemplate, hermes_tools.HermesTags]:
        """The compiled template, and the escaping of its tags that are ordinary text to the tokenizer."""
        source = self._chat_template or self._tokenizer_template(tools)
        if source not in self._templates:
            tags = hermes_tools.HermesTags([tag for tag in self._plain_tags if f"</{tag}>" in source])
            self._templates[source] = ChatTemplate(source), tags
        return self._templates[source]

    def _tokenizer_template(self, tools: Sequence[Any]) -> str:
        try:
            return str(self._tokenizer.get_chat_template(tools=list(tools) or None))
        except ValueError:
            names = ", ".join(self._tokenizer.chat_template)
            raise ConfigError(
                f"This tokenizer has no default chat template but {names}.", hint="Give one as chat_template=..."
            ) from None

    def _rendered(self, turns: Sequence[Turn], tools: Sequence[Any], generation_prompt: bool = False) -> str:
        template, _ = self._template(tools)
        return template.render(
            {
                **self._tokenizer.special_tokens_map,
                "documents": None,
                **self._template_args,
                "messages": list(turns),
                "tools": list(tools) or None,
                "add_generation_prompt": generation_prompt,
            }
        )

    def with_template_args(self, more: Mapping[str, Any]) -> PromptEncoder:
        """An encoder of the same tokenizer with additional template variables, which override the known ones."""
        together = {**self._template_args, **more}
        return PromptEncoder(self._tokenizer, template_args=together, chat_template=self._chat_template)

    @cached_property
    def reasoning(self) -> ReasoningFormat | None:
        """The model's reasoning format; None if neither vocabulary nor template has one."""
        return ReasoningFormat.of(self._tokenizer, self._source)

    @cached_property
    def _reasoning_variable(self) -> str | None:
        return reasoning_variable(self._source)

    @cached_property
    def _reasoning_tags(self) -> list[tuple[str, str]]:
        """Pairs of tags between which a message of another model may begin with its reasoning."""
        own = [(self.reasoning.opening.text, self.reasoning.closing.text)] if self.reasoning else []
        return [*own, *tag_pairs(set(), "<think>[THINK]<thinking>")]

    def _split_reasoning(self, turn: Turn) -> Turn:
        """An assistant turn with its reasoning split from its content, since templates drop earlier reasoning.

        Content that begins with reasoning between tags, as other providers leave it, is split. If the template reads
        reasoning, an empty one keeps it from cutting the content at a tag that the text only mentions.
        """
        if turn["role"] != "assistant" or "reasoning_content" in turn:
            return turn
        thought, answer = split_reasoning(turn["content"], self._reasoning_tags) or ("", turn["content"])
        cuts = self.reasoning is not None and self.reasoning.closing.text in answer
        kept = thought or (self._reasoning_variable and cuts)
        return {**turn, "content": answer} | ({"reasoning_content": thought} if kept else {})

    @cached_property
    def _roles_read_as_parts(self) -> frozenset[str]:
        """The roles whose content the template reads only as a list of parts."""
        roles = ("user", "assistant", "system")
        best, shown_best = frozenset[str](), -1
        for count in range(len(roles) + 1):
            for chosen in map(frozenset, itertools.combinations(roles, count)):
                form_tools = max(
                    self._count_rendered_roles(chosen, roles), self._count_rendered_roles(chosen, roles[:2])
                )
                if form_tools > shown_best:
                    best, shown_best = chosen, form_tools
        return best | {"tool"} if "user" in best else best

    def _count_rendered_roles(self, parts: frozenset[str], roles: Sequence[str]) -> int:
        """For how many of these roles the template renders the text."""
        order = [role for role in ("system", "user", "assistant", "user") if role in roles]
        turns = [{"role": role, "content": f"s2t-{role}"} for role in order]
        try:
            rendered = self._rendered(template_fallbacks.in_parts(turns, parts), ())
        except TemplateError:
            return 0
        if "'type'" in rendered or '"type"' in rendered:  # the list itself was rendered
            return 0
        return sum(f"s2t-{role}" in rendered for role in roles)

    @cached_property
    def supports_system(self) -> bool:
        """Whether the template renders a system turn."""
        turns = [{"role": "system", "content": "s2t-probe"}, {"role": "user", "content": "x"}]
        try:
            return "s2t-probe" in self._rendered(template_fallbacks.in_parts(turns, self._roles_read_as_parts), ())
        except TemplateError:
            return False

    @cached_property
    def supports_hermes_tools(self) -> bool:
        """Whether the template renders tools, and calls and results in the Hermes format."""
        function = {"name": "probe_tool", "description": "d", "parameters": {"type": "object", "properties": {}}}
        call = {"name": "probe_call", "arguments": {"x": 1}}
        turns: list[Turn] = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "tool_calls": [_probe_call(call)]},
            {"role": "tool", "content": "probe_result", "name": "probe_call", "tool_call_id": "call00001"},
        ]
        try:
            probe_turns = template_fallbacks.in_parts(turns, self._roles_read_as_parts)
            rendered = self._rendered(probe_turns, [{"type": "function", "function": function}])
            bodies = re.findall(f"{OPEN}\\s*(.*?)\\s*{CLOSE}", rendered, re.DOTALL)
            has_call = bool(bodies) and json.loads(bodies[-1]) == call
        except (TemplateError, json.JSONDecodeError):
            return False
        return has_call and "probe_tool" in rendered and "probe_result" in rendered


def _probe_call(function: Turn) -> Turn:
    return {"type": "function", "id": "call00001", "function": function}


def _overflow(tokens: str, limit: int) -> ContextOverflow:
    return ContextOverflow(
        f"The prompt has {tokens} tokens; {limit} fit.", hint="Shorten or summarize the history, or drop tools."
    )


def _traced_turn(turn: Turn, sources: Sources, where: str) -> Turn:
    """A turn with its strings traced; reasoning and name need not be rendered."""
    traced = dict(turn)
    content = traced["content"]
    cut = turn["role"] == "assistant" and "reasoning_content" not in turn
    closed = content.rfind("</think>") + 1 if cut else 0
    is_result = turn["role"] == "tool"
    needed_from = closed and closed + len("/think>")
    traced["content"] = sources.text(content, where, needed_from=needed_from, framed=is_result)
    for key in ("reasoning_content", "name"):
        if key in traced:
            traced[key] = sources.text(traced[key], where, needed_from=len(traced[key]), framed=is_result)
    if "tool_calls" in turn:
        traced["tool_calls"] = [
            {**call, "function": _traced_function(call["function"], sources, f"A tool call of {where}")}
            for call in turn["tool_calls"]
        ]
    return traced


def _traced_function(function: Turn, sources: Sources, where: str) -> Turn:
    arguments = sources.value(function["arguments"], where, lambda path, is_key: True)
    return {"name": sources.text(function["name"], where, framed=True), "arguments": arguments}


def _is_tool_text(path: tuple[str, ...], is_key: bool) -> bool:
    """Whether a string in a tool definition is text of the user's (name, description, enum), not a schema keyword."""
    if is_key:
        return path[-2:-1] in (("properties",), ("patternProperties",))
    return path[-1:] in (("name",), ("description",), ("enum",), ("const",), ("default",))


def _is_str(value: Any) -> bool:
    return isinstance(value, str)
