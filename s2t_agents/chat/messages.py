"""A conversation to token ids, by the model's chat template.

``to_template`` (``turns``) makes the turns; ``PromptEncoder`` renders them with the model's chat template and encodes
the result so that no text from outside becomes a control token (``tokenization.safe_encoding``). For templates without
Hermes tool calls (``template_features``), tools, calls and results are put in as text (``hermes_tools``), so that one
parser and one grammar serve all.

All given text is in the rendered prompt: if the template drops some of it or refuses the conversation, stricter forms
are tried (``template_fallbacks``); if none renders everything, the conversation is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from langchain_core.messages import BaseMessage, HumanMessage, ToolMessage

from ..errors import ConfigError, ContextOverflow, InputError
from ..formats.reasoning import ReasoningFormat, reasoning_variable, split_reasoning, tag_pairs
from ..tokenization.chat_template import ChatTemplate, check_template_args
from ..tokenization.safe_encoding import SafeEncoder
from ..tokenization.traced_text import Sources
from . import hermes_tools, template_fallbacks
from .hermes_tools import Turn
from .template_features import TemplateFeatures
from .turns import labelled, to_template


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

    Attributes:
        features: what the template can render.

    Raises:
        ConfigError: no chat template, an invalid one, no fast tokenizer, or ``template_args`` that no template sees.
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
        check_template_args(self._template_args)
        self._encoder = SafeEncoder(tokenizer, str(template))
        self._source = str(template)
        added = {token.content for token in tokenizer.backend_tokenizer.get_added_tokens_decoder().values()}
        plain_tags = [tag for tag in hermes_tools.TAGS if f"</{tag}>" not in added]
        self._hermes_tags = hermes_tools.HermesTags(plain_tags, cut_at=["think"] if "</think>" in str(template) else [])
        self._templates: dict[str, tuple[ChatTemplate, hermes_tools.HermesTags]] = {}
        self._plain_tags = plain_tags
        self.features = TemplateFeatures(self._rendered)

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

    def text_ids(self, text: str, *, limit: int | None = None, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text; control tokens in it are text.

        Args:
            text: any.
            limit: maximum number of tokens; a text that cannot fit is refused before it is encoded.
            add_special_tokens: with those that the tokenizer puts around every text, such as BOS.

        Raises:
            InputError: text that is not Unicode.
            ContextOverflow: more than ``limit`` tokens.
        """
        if limit is not None:
            self._refuse_too_long([text], limit)
        ids = self._encoder.encode(Sources().text(text, "The text"))
        if add_special_tokens:
            before, after = self._encoder.around
            ids = [*before, *ids, *after]
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
        labels = [where for where, _ in labelled(messages)]
        turns = [_traced_turn(turn, sources, where) for turn, where in zip(untraced, labels, strict=True)]
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
        for native in (True, False) if self.features.supports_hermes_tools else (False,):
            base_turns, form_tools = (turns, tools) if native else (self._hermes_tags.to_text_turns(turns, tools), [])
            first = base_turns if self.features.supports_system else template_fallbacks.system_in_user(base_turns)
            for form in template_fallbacks.fallback_forms(first):
                yield (
                    template_fallbacks.in_parts(self._with_reasoning(form), self.features.roles_read_as_parts),
                    form_tools,
                )

    @property
    def passes_over_tool_template(self) -> bool:
        """Whether the tokenizer's template for tools (``tool_use``) is never used: it is not Hermes."""
        named = () if self._chat_template else self._tokenizer.chat_template
        if not (isinstance(named, dict) and {"default", "tool_use"} <= named.keys()):
            return False
        return not self.features.supports_hermes_tools

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
