"""LangChain messages to template turns to token ids.

``to_template`` makes the turns; ``PromptEncoder`` renders them with the model's own chat template and encodes the
result so that nothing from outside becomes a control token (``models.safe_encoding``). Templates that do not speak
Hermes tool calls get tools, calls and results as text (``hermes``), so that one parser and one grammar serve all.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage

from . import hermes
from .errors import ConfigError, ContextOverflow, InputError
from .models.safe_encoding import SafeEncoder, check_text
from .tool_calls import CLOSE, OPEN

Turn = hermes.Turn

_ROLES = ((SystemMessage, "system"), (HumanMessage, "user"), (AIMessage, "assistant"), (ToolMessage, "tool"))
_TEXT_BLOCKS = {"text", "text-plain"}
_CALL_BLOCKS = {"tool_use", "tool_call", "tool_call_chunk", "invalid_tool_call", "input_json_delta", "function_call"}
_THOUGHT_BLOCKS = {"reasoning": "reasoning", "thinking": "thinking"}
_SILENT_BLOCKS = {*_CALL_BLOCKS, *_THOUGHT_BLOCKS, "redacted_thinking"}

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
        role = next((role for kind, role in _ROLES if isinstance(message, kind)), None)
        where = f"Message {at} ({type(message).__name__})"
        if role is None:
            raise InputError(f"{where} cannot be rendered.", hint="Use System-, Human-, AI- and ToolMessages.")
        turn: Turn = {"role": role, "content": check_text(_text_of(message, where), where)}
        if isinstance(message, AIMessage):
            turn |= _said_besides(message, calls, numbers)
        elif isinstance(message, ToolMessage):
            turn |= _answered(message, calls, where)
        turns.append(turn)
    return turns


def _text_of(message: BaseMessage, where: str) -> str:
    content: Any = message.content
    if content is None or isinstance(content, str):
        return content or ""
    silent = _SILENT_BLOCKS if isinstance(message, AIMessage) else set()
    texts = []
    for block in content:
        if isinstance(block, str):
            texts.append(block)
            continue
        kind = block.get("type", "untyped")
        if kind in _TEXT_BLOCKS:
            texts.append(str(block.get("text") or ""))
        elif kind == "json" and isinstance(message, ToolMessage):
            texts.append(json.dumps(block.get("json"), ensure_ascii=False))
        elif kind not in silent:
            raise InputError(
                f"{where} holds a {kind!r} content block.", hint="This model reads text alone: pass text blocks."
            )
    return "".join(texts)


def _said_besides(message: AIMessage, calls: _Calls, numbers: Iterator[int]) -> Turn:
    """Tool calls and reasoning of an assistant turn; the calls are entered under the ids they were made with."""
    made: list[tuple[str | None, str, Any]] = [(c["id"], c["name"], c["args"]) for c in message.tool_calls]
    made += [
        (broken["id"], broken["name"] or "unknown", {"invalid_arguments": broken["args"] or ""})
        for broken in message.invalid_tool_calls
    ]
    entered: _Calls = {}
    told = []
    for call_id, name, args in made:
        own = f"call{next(numbers):05d}"
        entered.setdefault(own if call_id is None else call_id, []).append((own, name))
        told.append({"type": "function", "id": own, "function": {"name": name, "arguments": args}})
    calls |= entered  # an id of an earlier turn means this turn's call from here on
    blocks = [block for block in message.content or () if isinstance(block, dict)]
    thought = "".join(
        str(block.get(_THOUGHT_BLOCKS[block["type"]]) or "") for block in blocks if block.get("type") in _THOUGHT_BLOCKS
    )
    thought = thought or message.additional_kwargs.get("reasoning_content") or ""
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


class PromptEncoder:
    """Messages and tools to token ids, by a tokenizer's own chat template.

    Args:
        tokenizer: a fast Hugging Face tokenizer with a chat template.
        template_args: more variables for the template, such as ``{"enable_thinking": False}``.

    Raises:
        ConfigError: no chat template, or no fast tokenizer.
    """

    def __init__(self, tokenizer: Any, *, template_args: Mapping[str, Any] | None = None) -> None:
        template = getattr(tokenizer, "chat_template", None)
        if not template:
            raise ConfigError(
                "This tokenizer has no chat template.",
                hint="Use a chat model, or set tokenizer.chat_template.",
            )
        self._tokenizer = tokenizer
        self._template_args = dict(template_args or {})
        self._safe = SafeEncoder(tokenizer, str(template))

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
            InputError: messages that cannot be rendered, see ``to_template``, or that the template refuses.
            ContextOverflow: more than ``limit`` tokens.
        """
        if limit is not None:  # before the work of rendering
            told = [m.content for m in messages if isinstance(m, HumanMessage | ToolMessage)]
            self._refuse_hopeless([text.strip() for text in told if isinstance(text, str)], limit)
        rendered = self._render(messages, tools, generation_prompt)
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
        return self._safe.encode(self._safe.shield(text, "The text"))

    def render(
        self,
        messages: Sequence[BaseMessage],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        generation_prompt: bool = True,
    ) -> str:
        """The prompt as text, for people; do not encode it, or text from outside may become control tokens."""
        return self._safe.unshield(self._render(messages, tools, generation_prompt))

    def _render(
        self, messages: Sequence[BaseMessage], tools: Sequence[Mapping[str, Any]], generation_prompt: bool
    ) -> str:
        turns = [self._shielded(turn) for turn in to_template(messages)]
        safe_tools = [self._safe.shield(tool, "A tool") for tool in tools]
        if not self.speaks_hermes:
            turns, safe_tools = hermes.as_text(turns, safe_tools), []
        if not self.takes_system:
            turns = _without_system(turns)
        refusal: Exception | None = None
        for arranged in _arrangements(turns):
            try:
                return self._apply(arranged, safe_tools, generation_prompt)
            except (TemplateError, TypeError, ValueError, KeyError, RecursionError) as error:
                refusal = refusal or error
        raise InputError(f"The chat template refuses these messages: {refusal}") from refusal

    def _shielded(self, turn: Turn) -> Turn:
        shield = self._safe.shield
        safe = dict(turn)
        if turn["role"] == "tool" and self._frames_in_letters:
            safe["content"] = hermes.kept_inside(turn["content"])
        if turn["role"] == "assistant" and "reasoning_content" not in turn:
            safe |= _thought_apart(turn["content"])
        if "tool_calls" in turn:
            safe["tool_calls"] = [
                {**call, "function": shield(call["function"], "A tool call")} for call in turn["tool_calls"]
            ]
        for key in ("content", "reasoning_content", "name"):
            if key in safe:
                safe[key] = shield(safe[key])
        return safe

    def _apply(self, turns: Sequence[Turn], tools: Sequence[Any], generation_prompt: bool = False) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                list(turns),
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **self._template_args,
            )
        )

    @cached_property
    def _frames_in_letters(self) -> bool:
        """Whether the template frames a tool's result with tags that are ordinary letters to the tokenizer."""
        return self.speaks_hermes and hermes.RESPONSE_END not in self._tokenizer.get_added_vocab()

    @cached_property
    def takes_system(self) -> bool:
        """Whether the template renders a system turn."""
        turns = [{"role": "system", "content": "s2t-probe"}, {"role": "user", "content": "x"}]
        try:
            return "s2t-probe" in self._apply(turns, ())
        except (TemplateError, TypeError, ValueError, KeyError):
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
            rendered = self._apply(turns, [{"type": "function", "function": function}])
            bodies = re.findall(f"{OPEN}\\s*(.*?)\\s*{CLOSE}", rendered, re.DOTALL)
            spoken = bool(bodies) and json.loads(bodies[-1]) == call
        except (TemplateError, TypeError, ValueError, KeyError):
            return False
        return spoken and "probe_tool" in rendered and "probe_result" in rendered


def _numbered(function: Turn) -> Turn:
    return {"type": "function", "id": "call00001", "function": function}


def _overflow(tokens: str, limit: int) -> ContextOverflow:
    return ContextOverflow(
        f"The prompt has {tokens} tokens; {limit} fit.", hint="Shorten or summarize the history, or drop tools."
    )


def _thought_apart(content: str) -> Turn:
    """An answer that begins with its ``<think>`` block, in two parts: templates leave old thoughts out."""
    if not content.lstrip().startswith("<think>") or "</think>" not in content:
        return {}
    thought, _, answer = content.partition("</think>")
    return {"reasoning_content": thought.lstrip().removeprefix("<think>").strip(), "content": answer.lstrip("\n")}


def _arrangements(turns: list[Turn]) -> Iterator[list[Turn]]:
    """The conversation as it is, then in stricter forms, for templates that refuse it as it is."""
    yield turns
    single = _one_call_each(turns)
    if single != turns:
        yield single
    gathered = _merged(_system_first(turns))
    if gathered != turns:
        yield gathered
        yield _one_call_each(gathered)


def _without_system(turns: Sequence[Turn]) -> list[Turn]:
    """System text moved to the head of the first user turn."""
    said = "\n\n".join(turn["content"] for turn in turns if turn["role"] == "system")
    rest = [turn for turn in turns if turn["role"] != "system"]
    if not said:
        return rest
    if rest and rest[0]["role"] == "user":
        return [{**rest[0], "content": f"{said}\n\n{rest[0]['content']}"}, *rest[1:]]
    return [{"role": "user", "content": said}, *rest]


def _system_first(turns: Sequence[Turn]) -> list[Turn]:
    system = [turn for turn in turns if turn["role"] == "system"]
    return system + [turn for turn in turns if turn["role"] != "system"]


def _merged(turns: Sequence[Turn]) -> list[Turn]:
    """Neighbours of one role in one turn, but for calls and their results."""
    told: list[Turn] = []
    for turn in turns:
        before = told[-1] if told else None
        plain = turn["role"] != "tool" and "tool_calls" not in turn
        if before and plain and before["role"] == turn["role"] and "tool_calls" not in before:
            told[-1] = {**before, "content": f"{before['content']}\n\n{turn['content']}"}
        else:
            told.append(turn)
    return told


def _one_call_each(turns: Sequence[Turn]) -> list[Turn]:
    """Each tool call in a turn of its own, followed by its result."""
    results = {turn["tool_call_id"]: turn for turn in turns if turn["role"] == "tool"}
    told: list[Turn] = []
    for turn in turns:
        calls = turn.get("tool_calls", ())
        if turn["role"] == "tool":
            continue
        if not calls:
            told.append(turn)
        for at, call in enumerate(calls):
            content = turn["content"] if at == 0 else ""
            told.append({"role": "assistant", "content": content, "tool_calls": [call]})
            told += [results[call["id"]]] if call["id"] in results else []
    return told
