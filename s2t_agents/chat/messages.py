"""LangChain messages to template turns to token ids.

``to_template`` makes the turns; ``PromptEncoder`` renders them with the model's own chat template and encodes the
result so that nothing from outside becomes a control token (``models.safe_encoding``). Templates that do not speak
Hermes tool calls get tools, calls and results as text (``hermes``), so that one parser and one grammar serve all.

Every text that was given is in the rendering. A template that leaves some of it out, or refuses the conversation, gets
it in a stricter form (``template_fallbacks``); where none shows everything, the conversation is refused.
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
from ..formats.reasoning import ReasoningFormat, tag_pairs, thought_apart, variable_of
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
_SPOKEN = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "ai": "assistant",
}
_Calls = dict[str, list[tuple[str, str]]]
"""LangChain's id of a call, which some providers use again, to our ids and tool names: those not answered yet."""


def to_template(messages: Sequence[BaseMessage]) -> list[Turn]:
    """Turns as Hugging Face chat templates read them: role, content (always text), tool_calls, tool_call_id, name.

    Call ids are numbered anew in order (``call00001``: nine letters and digits, which some templates insist on),
    so a prompt does not change with random ids. Arguments that were no JSON stay visible under
    ``invalid_arguments``.

    Raises:
        InputError: no messages; a message or content block that cannot be rendered; a tool result for a call
            that nobody made; text that is not Unicode.
    """
    if not messages:
        raise InputError("There are no messages.", hint="Pass at least one HumanMessage.")
    calls: _Calls = {}
    numbers = itertools.count(1)
    turns: list[Turn] = []
    for at, message in enumerate(messages):
        where = _named(at, message)
        turn: Turn = {
            "role": _role_of(message, where),
            "content": check_text(content_blocks.text_of(message, where), where),
        }
        if isinstance(message, AIMessage):
            turn |= _said_besides(message, calls, numbers)
        elif isinstance(message, ToolMessage):
            turn |= _answered(message, calls, where)
        elif isinstance(message, FunctionMessage):
            turn |= _answered_by_name(message, calls, where)
        turns.append(turn)
    return turns


def _named(at: int, message: BaseMessage) -> str:
    return f"Message {at} ({type(message).__name__})"


def _role_of(message: BaseMessage, where: str) -> str:
    role = next((role for kind, role in _ROLES if isinstance(message, kind)), None)
    if isinstance(message, ChatMessage):
        role = _SPOKEN.get(message.role.lower())
    if role is None:
        raise InputError(f"{where} cannot be rendered.", hint="Use System-, Human-, AI- and ToolMessages.")
    return role


def _said_besides(message: AIMessage, calls: _Calls, numbers: Iterator[int]) -> Turn:
    """Tool calls and reasoning of an assistant turn; the calls are entered under the ids they were made with."""
    entered: _Calls = {}
    told = []
    for call_id, name, args in content_blocks.calls_of(message):
        own = f"call{next(numbers):05d}"
        entered.setdefault(own if call_id is None else call_id, []).append((own, name))
        told.append({"type": "function", "id": own, "function": {"name": name, "arguments": args}})
    calls |= entered  # an id of an earlier turn means this turn's call from here on
    thought = content_blocks.thought_of(message) or message.additional_kwargs.get("reasoning_content") or ""
    return ({"tool_calls": told} if told else {}) | ({"reasoning_content": thought} if thought else {})


def _answered(message: ToolMessage, calls: _Calls, where: str) -> Turn:
    """Whose result it is; calls of one id are answered in the order they were made."""
    if message.tool_call_id not in calls:
        known = ", ".join(map(repr, calls)) or "none at all"
        raise InputError(
            f"{where} answers tool call {message.tool_call_id!r}, which no earlier AIMessage made (calls: {known}).",
            hint="Keep the AIMessage with that call in the history.",
        )
    same = calls[message.tool_call_id]
    own, name = same.pop(0) if len(same) > 1 else same[0]
    return {"tool_call_id": own, "name": message.name or name}


def _answered_by_name(message: FunctionMessage, calls: _Calls, where: str) -> Turn:
    """The last call of the function, since functions were called without ids."""
    made = [(own, name) for same in calls.values() for own, name in same if name == message.name]
    if not made:
        raise InputError(
            f"{where} answers a call of {message.name!r}, which no earlier AIMessage made.",
            hint="Keep the AIMessage with that call in the history.",
        )
    own, name = made[-1]
    return {"tool_call_id": own, "name": name}


@dataclass(frozen=True)
class Arrangement:
    """A conversation in the form in which a template shows all of it.

    Attributes:
        turns: for ``apply_chat_template``: the given ones, or others with the same text.
        tools: likewise; empty where the tools stand in the system turn's text.
        rendered: what the template made of them; the origin of each character is known (``models.traced``).
    """

    turns: list[Turn]
    tools: list[Any]
    rendered: str


class PromptEncoder:
    """Messages and tools to token ids, by a tokenizer's own chat template.

    Args:
        tokenizer: a fast Hugging Face tokenizer with a chat template.
        template_args: more variables for the template, such as ``{"enable_thinking": False}``. Text in them counts as
            the template's own: control tokens in it are control tokens.
        chat_template: its source, in place of the tokenizer's own.

    Raises:
        ConfigError: no chat template, one that is no template, or no fast tokenizer.
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
        if not isinstance(template, str) and not (isinstance(template, dict) and all(map(_is_text, template.values()))):
            raise ConfigError(
                f"This tokenizer's chat template is no text but {template!r:.40}.", hint="Give one as chat_template=..."
            )
        self._chat_template = chat_template
        self._tokenizer = tokenizer
        self._template_args = dict(template_args or {})
        self._safe = SafeEncoder(tokenizer, str(template))
        self._source = str(template)
        added = {token.content for token in tokenizer.backend_tokenizer.get_added_tokens_decoder().values()}
        letters = [tag for tag in hermes_tools.TAGS if f"</{tag}>" not in added]
        self._frames = hermes_tools.Frames(letters, cut_at=["think"] if "</think>" in str(template) else [])
        self._templates: dict[str, tuple[ChatTemplate, hermes_tools.Frames]] = {}
        self._letters = letters

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
            limit: most tokens allowed; a text that cannot fit is refused before it is encoded.

        Raises:
            InputError: messages that cannot be rendered, see ``arrange``.
            ContextOverflow: more than ``limit`` tokens.
        """
        if limit is not None:  # before the work of rendering
            told = [m.content for m in messages if isinstance(m, HumanMessage | ToolMessage)]
            self._refuse_hopeless([text.strip() for text in told if isinstance(text, str)], limit)
        rendered = self.arrange(messages, tools, generation_prompt=generation_prompt).rendered
        if limit is not None:
            self._refuse_hopeless([rendered], limit)
        ids = self._safe.encode(rendered)
        if limit is not None and len(ids) > limit:
            raise _overflow(str(len(ids)), limit)
        return ids

    def _refuse_hopeless(self, texts: Sequence[str], limit: int) -> None:
        fewest = sum(map(self._safe.fewest_tokens, texts))
        if fewest > limit:
            raise _overflow(f"at least {fewest}", limit)

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text by itself, nothing of which is a control token.

        Raises:
            InputError: text that is not Unicode.
        """
        return self._safe.encode(Sources().text(text, "The text"))

    def render(
        self,
        messages: Sequence[BaseMessage],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        generation_prompt: bool = True,
    ) -> str:
        """The prompt as text, for people; do not encode it, or text from outside may become control tokens."""
        return str.__str__(self.arrange(messages, tools, generation_prompt=generation_prompt).rendered)

    def arrange(
        self,
        messages: Sequence[BaseMessage],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        generation_prompt: bool = True,
    ) -> Arrangement:
        """The conversation in the first form that the template takes and of which it shows every text.

        What need not be shown: white space around a text, thoughts, and what stands before a ``</think>``.

        Raises:
            InputError: messages that cannot be rendered, see ``to_template``; a template that refuses every form, or
                shows none in full.
        """
        try:
            return self._arranged(messages, tools, generation_prompt)
        except RecursionError as error:
            raise InputError(
                "A tool or the arguments of a call are nested too deep for the chat template.",
                hint="Nest them some tens of levels deep at most.",
            ) from error

    def _arranged(
        self, messages: Sequence[BaseMessage], tools: Sequence[Mapping[str, Any]], generation_prompt: bool
    ) -> Arrangement:
        sources = Sources()
        told = [self._thought_apart(turn) for turn in to_template(messages)]
        turns = [_traced(turn, sources, _named(at, messages[at])) for at, turn in enumerate(told)]
        given = [sources.value(tool, f"Tool {at}", _said_by_a_tool) for at, tool in enumerate(tools)]
        refusal, hidden = None, list[str]()
        for arranged, shown in self._forms(turns, given):
            try:
                rendered = self._rendered(arranged, shown, generation_prompt)
            except TemplateError as error:
                refusal = refusal or error
                continue
            left_out = sources.left_out(rendered)
            if not left_out:
                return Arrangement(arranged, shown, rendered)
            hidden = hidden or left_out
        if refusal is None or hidden:
            raise InputError(
                f"The chat template leaves out text of: {', '.join(hidden)}.",
                hint="Leave it out yourself, or use another chat template.",
            ) from refusal
        raise InputError(f"The chat template refuses these messages: {refusal}") from refusal

    def _forms(self, turns: list[Turn], tools: list[Any]) -> Iterator[tuple[list[Turn], list[Any]]]:
        """Turns and tools, from the form nearest to what was given to the one with most changed."""
        for native in (True, False) if self.speaks_hermes else (False,):
            told, shown = (turns, tools) if native else (self._frames.as_text(turns, tools), [])
            first = told if self.takes_system else template_fallbacks.system_in_user(told)
            for form in template_fallbacks.forms(first):
                yield template_fallbacks.in_parts(self._kept_inside(form, shown), self._reads_parts), shown

    def _kept_inside(self, turns: list[Turn], tools: Sequence[Any]) -> list[Turn]:
        """Results and names of calls that do not close the template's own frames of letters; thoughts where it reads
        them."""
        _, frames = self._template(tools)
        told = []
        for turn in turns:
            if "reasoning_content" in turn:
                thought = {self._thought_variable: turn["reasoning_content"]} if self._thought_variable else {}
                turn = {key: value for key, value in turn.items() if key != "reasoning_content"} | thought
            if turn["role"] == "tool":
                turn = {**turn, "content": frames.kept_inside(turn["content"])}
            if "tool_calls" in turn:
                turn = {**turn, "tool_calls": [_call_kept_inside(call, frames) for call in turn["tool_calls"]]}
            told.append(turn)
        return told

    def _template(self, tools: Sequence[Any]) -> tuple[ChatTemplate, hermes_tools.Frames]:
        """The tokenizer's template, and those of its frames that are letters."""
        source = self._chat_template or self._of_tokenizer(tools)
        if source not in self._templates:
            frames = hermes_tools.Frames([tag for tag in self._letters if f"</{tag}>" in source])
            self._templates[source] = ChatTemplate(source, as_json=frames.kept_inside), frames
        return self._templates[source]

    def _of_tokenizer(self, tools: Sequence[Any]) -> str:
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
        """An encoder of the same tokenizer with more variables for the template, which go before the known ones."""
        together = {**self._template_args, **more}
        return PromptEncoder(self._tokenizer, template_args=together, chat_template=self._chat_template)

    @cached_property
    def reasoning(self) -> ReasoningFormat | None:
        """How the model thinks before it answers; None where neither vocabulary nor template knows of thoughts."""
        return ReasoningFormat.of(self._tokenizer, self._source)

    @cached_property
    def _thought_variable(self) -> str | None:
        return variable_of(self._source)

    @cached_property
    def _thought_tags(self) -> list[tuple[str, str]]:
        """Between which tags a content of unknown origin may begin with its thought."""
        own = [(self.reasoning.opening.text, self.reasoning.closing.text)] if self.reasoning else []
        return [*own, *tag_pairs(set(), "<think>[THINK]<thinking>")]

    def _thought_apart(self, turn: Turn) -> Turn:
        """An assistant's turn with its thought apart: templates leave old thoughts out.

        A content that begins with its thought, as other providers leave it there, is parted. Where the template reads
        thoughts, an empty one keeps it from cutting a text at a tag that the text only speaks of.
        """
        if turn["role"] != "assistant" or "reasoning_content" in turn:
            return turn
        thought, answer = thought_apart(turn["content"], self._thought_tags) or ("", turn["content"])
        cuts = self.reasoning is not None and self.reasoning.closing.text in answer
        kept = thought or (self._thought_variable and cuts)
        return {**turn, "content": answer} | ({"reasoning_content": thought} if kept else {})

    @cached_property
    def _reads_parts(self) -> frozenset[str]:
        """The roles whose content the template reads as a list of parts alone."""
        roles = ("user", "assistant", "system")
        best, shown_best = frozenset[str](), -1
        for count in range(len(roles) + 1):
            for chosen in map(frozenset, itertools.combinations(roles, count)):
                shown = max(self._shows(chosen, roles), self._shows(chosen, roles[:2]))
                if shown > shown_best:
                    best, shown_best = chosen, shown
        return best | {"tool"} if "user" in best else best

    def _shows(self, parts: frozenset[str], roles: Sequence[str]) -> int:
        """How many of these roles' texts the template shows."""
        order = [role for role in ("system", "user", "assistant", "user") if role in roles]
        turns = [{"role": role, "content": f"s2t-{role}"} for role in order]
        try:
            rendered = self._rendered(template_fallbacks.in_parts(turns, parts), ())
        except TemplateError:
            return 0
        if "'type'" in rendered or '"type"' in rendered:  # the list itself was printed
            return 0
        return sum(f"s2t-{role}" in rendered for role in roles)

    @cached_property
    def takes_system(self) -> bool:
        """Whether the template renders a system turn."""
        turns = [{"role": "system", "content": "s2t-probe"}, {"role": "user", "content": "x"}]
        try:
            return "s2t-probe" in self._rendered(template_fallbacks.in_parts(turns, self._reads_parts), ())
        except TemplateError:
            return False

    @cached_property
    def speaks_hermes(self) -> bool:
        """Whether the template renders tools, and calls and their results in the Hermes way."""
        function = {"name": "probe_tool", "description": "d", "parameters": {"type": "object", "properties": {}}}
        call = {"name": "probe_call", "arguments": {"x": 1}}
        turns: list[Turn] = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "tool_calls": [_numbered(call)]},
            {"role": "tool", "content": "probe_result", "name": "probe_call", "tool_call_id": "call00001"},
        ]
        try:
            told = template_fallbacks.in_parts(turns, self._reads_parts)
            rendered = self._rendered(told, [{"type": "function", "function": function}])
            bodies = re.findall(f"{OPEN}\\s*(.*?)\\s*{CLOSE}", rendered, re.DOTALL)
            spoken = bool(bodies) and json.loads(bodies[-1]) == call
        except (TemplateError, json.JSONDecodeError):
            return False
        return spoken and "probe_tool" in rendered and "probe_result" in rendered


def _numbered(function: Turn) -> Turn:
    return {"type": "function", "id": "call00001", "function": function}


def _overflow(tokens: str, limit: int) -> ContextOverflow:
    return ContextOverflow(
        f"The prompt has {tokens} tokens; {limit} fit.", hint="Shorten or summarize the history, or drop tools."
    )


def _traced(turn: Turn, sources: Sources, where: str) -> Turn:
    """A turn whose strings from outside are traced; its thoughts and its name need not be shown."""
    told = dict(turn)
    content = told["content"]
    cut = turn["role"] == "assistant" and "reasoning_content" not in turn
    closed = content.rfind("</think>") + 1 if cut else 0
    told["content"] = sources.text(content, where, needed_from=closed and closed + len("/think>"))
    for key in ("reasoning_content", "name"):
        if key in told:
            told[key] = sources.text(told[key], where, needed_from=len(told[key]))
    if "tool_calls" in turn:
        told["tool_calls"] = [
            {**call, "function": _function(call["function"], sources, f"A tool call of {where}")}
            for call in turn["tool_calls"]
        ]
    return told


def _function(function: Turn, sources: Sources, where: str) -> Turn:
    arguments = sources.value(function["arguments"], where, lambda path, is_key: True)
    return {"name": sources.text(function["name"], where), "arguments": arguments}


def _call_kept_inside(call: Turn, frames: hermes_tools.Frames) -> Turn:
    return {**call, "function": {**call["function"], "name": frames.kept_inside(call["function"]["name"])}}


def _said_by_a_tool(path: tuple[str, ...], is_key: bool) -> bool:
    """Whether a string of a tool's definition says what the tool is: other ones are the schema's own words."""
    if is_key:
        return path[-2:-1] in (("properties",), ("patternProperties",))
    return path[-1:] in (("name",), ("description",), ("enum",), ("const",), ("default",))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
