"""Reasoning formats: the tags around a model's reasoning, and a streaming parser that splits reasoning from answer.

The tags are detected in the vocabulary and the chat template, without a list of model names. If a tag is one token of
the vocabulary, only that token is the tag, and the same characters in other tokens are text; otherwise the characters
are the tag, at any token boundaries.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

from ..errors import ConfigError

ReasoningPhase = Literal["undecided", "thought", "answer"]
"""State at the end of a prompt: "undecided", the model may begin reasoning or answer; "thought", the template has
opened the reasoning; "answer", the template has closed it, or opened the answer's channel."""

_TAG = re.compile(
    r"(?P<left>[<\[◁])(?P<outer>/?)(?P<bar>\|?)(?P<inner>/?)"
    r"(?P<name>(?:\w+:)?(?:(?:begin|start|end)(?:_of)?_)?(?:think|thinking|thoughts?|reasoning)(?:_(?:begin|start|end))?)"
    r"(?P<right>\|?[>\]▷])",
    re.IGNORECASE,
)
_ENDS = {"begin": "end", "start": "end", "BEGIN": "END", "START": "END"}

_CHANNEL_FORMATS = (  # its tokens; opening and closing tag; bridge to the answer; prefix of an answer without thought
    (
        ("<|channel|>", "<|message|>", "<|start|>", "<|end|>"),  # OpenAI's harmony
        "<|channel|>analysis<|message|>",
        "<|end|>",
        "<|start|>assistant<|channel|>final<|message|>",
        "<|channel|>final<|message|>",
    ),
    (("<|channel>", "<channel|>"), "<|channel>thought\n", "<channel|>", "", ""),  # Gemma 4
)

TextPieces = list[tuple[int | None, str]]
"""Tokens and the text that each adds; None as token for more text of a token that was given before."""

_WHITESPACE = " \t\n\r\v\f"

_REASONING_VARIABLES = ("reasoning_content", "thinking", "reasoning", "thought")
"""Keys under which templates read an assistant turn's reasoning; the first that a template names is used."""


@dataclass(frozen=True)
class Tag:
    """A tag in one tokenizer.

    Attributes:
        text: its characters.
        ids: its token ids.
        by_token: whether it contains an added token; otherwise it is ordinary text to the tokenizer.
    """

    text: str
    ids: tuple[int, ...]
    by_token: bool

    @classmethod
    def of(cls, text: str, tokenizer: Any) -> Tag:
        """Encode a tag with a tokenizer."""
        ids = tuple(tokenizer.encode(text, add_special_tokens=False))
        added = tokenizer.added_tokens_decoder
        return cls(text, ids, any(i in added and added[i].content.strip() for i in ids))


@dataclass(frozen=True)
class ReasoningFormat:
    """The tags of a model's reasoning.

    Attributes:
        opening: begins the reasoning; generated, or part of the prompt.
        closing: ends it.
        bridge: required between reasoning and answer, such as the header of the answer's channel; None for most.
        bare: required before an answer without reasoning; None for most.
    """

    opening: Tag
    closing: Tag
    bridge: Tag | None = None
    bare: Tag | None = None

    @classmethod
    def of(cls, tokenizer: Any, template: str) -> ReasoningFormat | None:
        """Detect the format; None if neither vocabulary nor template has reasoning tags.

        Args:
            tokenizer: a fast Hugging Face tokenizer.
            template: the chat template's source.
        """
        added = {token.content for token in tokenizer.added_tokens_decoder.values()}
        for marks, opening, closing, bridge, bare in _CHANNEL_FORMATS:
            if added.issuperset(marks):
                rest = [Tag.of(text, tokenizer) if text else None for text in (bridge, bare)]
                return cls(Tag.of(opening, tokenizer), Tag.of(closing, tokenizer), *rest)
        pairs = tag_pairs(added, template)
        if not pairs:
            return None
        return cls(*(Tag.of(tag, tokenizer) for tag in pairs[0]))

    def phase_after(self, tokenizer: Any, prompt: Sequence[int]) -> ReasoningPhase:
        """The phase at the end of a prompt: the template may have opened the reasoning, or closed it."""
        tail = list(prompt[-64:])
        text = str(tokenizer.decode(tail, skip_special_tokens=False)).rstrip()

        def ends_with(tag: Tag | None) -> bool:
            if tag is None or not text.endswith(tag.text.rstrip()):
                return False
            return not tag.by_token or tag.ids[0] in tail[-len(tag.ids) - 8 :]

        if any(map(ends_with, (self.closing, self.bridge, self.bare))):
            return "answer"
        return "thought" if ends_with(self.opening) else "undecided"


def has_reasoning(added: set[str], template: str) -> bool:
    """Whether ``ReasoningFormat.of`` finds a format, from the added tokens and the chat template alone."""
    return any(added.issuperset(marks) for marks, *_ in _CHANNEL_FORMATS) or bool(tag_pairs(added, template))


def tag_pairs(added: set[str], template: str) -> list[tuple[str, str]]:
    """Pairs of reasoning tags, best first: those that are added tokens and that the template names.

    For a tag that the template names alone (it only opens reasoning, or only cuts off earlier reasoning), the other
    tag is derived from its form.
    """
    ranked: dict[tuple[str, str], tuple[bool, bool]] = {}
    named = {match[0] for match in _TAG.finditer(template)}
    for word in sorted(named | {word for word in added if _TAG.fullmatch(word)}):
        forms = _pairs_with(word)
        known = next((pair for pair in forms if added.issuperset(pair)), None)
        known = known or next((pair for pair in forms if named.issuperset(pair)), None)
        if known is None and word in named and forms:
            known = forms[0]
        if known:
            ranked[known] = (added.issuperset(known), bool(named & set(known)))
    return sorted(ranked, key=lambda pair: (sum(ranked[pair]), ranked[pair]), reverse=True)


def _pairs_with(word: str) -> list[tuple[str, str]]:
    """The pairs that a tag may belong to, the most common first."""
    match = _TAG.fullmatch(word)
    assert match is not None
    left, bar, name, right = (match[group] for group in ("left", "bar", "name", "right"))
    parts = re.split(r"(?<=_)|(?=_)", name)
    if match["outer"] or match["inner"]:
        return [(f"{left}{bar}{name}{right}", word)]
    if any(part.lower() == "end" for part in parts):
        starts = {"end": ("begin", "start"), "END": ("BEGIN", "START")}
        choices = [[starts.get(part, (part, part))[at] for part in parts] for at in (0, 1)]
        return [(f"{left}{bar}{''.join(opening)}{right}", word) for opening in choices]
    if any(part in _ENDS for part in parts):
        return [(word, f"{left}{bar}{''.join(_ENDS.get(part, part) for part in parts)}{right}")]
    return [(word, f"{left}{bar}/{name}{right}"), (word, f"{left}/{bar}{name}{right}")]


def parse_max_thinking_tokens(given: Any) -> int | None:
    """Validate ``max_thinking_tokens``; None is no limit.

    Raises:
        ConfigError: not a whole number of at least 0.
    """
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, Integral) or given < 0:
        raise ConfigError(
            f"max_thinking_tokens is {given!r}; it must be a whole number of tokens, 0 or more.",
            hint="0 closes every thought at once; None sets no limit beside max_tokens.",
        )
    return int(given)


def reasoning_variable(template: str) -> str | None:
    """The key under which a chat template reads an assistant turn's reasoning; None if it reads none."""
    read = set(re.findall(r"""(?:\.|\[\s*['"]|get\(\s*['"]|['"])(\w+)""", template))
    return next((name for name in _REASONING_VARIABLES if name in read), None)


def split_reasoning(content: str, tags: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    """Reasoning and answer of a content that begins with reasoning between tags; None for other content."""
    text = content.lstrip()
    for opening, closing in tags:
        if text.startswith(opening) and closing in text:
            thought, _, answer = text[len(opening) :].partition(closing)
            return thought.strip(), answer.lstrip("\n")
    return None


class ReasoningParser:
    """Streaming parser that splits one generation into reasoning and answer.

    Tags are in neither. White space around the reasoning, and before an answer that follows it, is dropped.

    Args:
        format: the model's reasoning format.
        phase: at the end of the prompt.

    Attributes:
        reasoning: the reasoning text so far.
        tokens: number of reasoning tokens, tags included; a token that ends the closing tag and begins the answer
            counts.
        thinking: whether the next token is reasoning.
    """

    def __init__(self, format: ReasoningFormat, phase: ReasoningPhase) -> None:
        self._format = format
        self._phase: Literal["undecided", "thought", "bridge", "answer"] = phase
        self.reasoning = ""
        self.tokens = 0
        self._count = 0
        self._held: TextPieces = []  # held back: may be the opening tag, or white space before it
        self._tag_prefix: list[int] = []  # tokens of an incomplete tag
        self._text = ""  # reasoning held back: a possible prefix of the closing tag, or trailing white space
        self._stripping = False  # white space between reasoning and answer

    @property
    def thinking(self) -> bool:
        """Whether the next token is reasoning."""
        return self._phase in ("thought", "bridge")

    def push(self, token_id: int, text: str) -> tuple[str, TextPieces]:
        """Parse one step: its token and the text it adds, which may contain the characters of a tag token or not.

        Returns:
            The reasoning text that it adds, and the tokens and texts of the answer.
        """
        self._count += 1
        reasoning: str = ""
        pieces: TextPieces = []
        if self._phase == "undecided":
            pieces = self._detect_opening(token_id, text)
            if self.thinking:
                rest, pieces = pieces[0][1] if pieces else "", []
                reasoning, pieces = self._read_thought(None, rest)
        elif self._phase == "thought":
            reasoning, pieces = self._read_thought(token_id, text)
        elif self._phase == "bridge":
            self._skip_bridge()
        else:
            pieces = [(token_id, text)]
        return reasoning, self._strip_leading_space(pieces)

    def finish(self, text: str) -> tuple[str, TextPieces]:
        """End of the generation: the text held back, and the detokenizer's remaining text."""
        held, self._held = self._held, []
        if self.thinking:
            return self._show((self._text + text).rstrip()), []
        return "", self._strip_leading_space([*held, (None, text)])

    def _detect_opening(self, token_id: int, text: str) -> TextPieces:
        """Detect whether reasoning or the answer begins; returns the first pieces of either."""
        tags = [tag for tag in (self._format.opening, self._format.bare) if tag is not None and tag.by_token]
        tag_ids = (*self._tag_prefix, token_id)
        matching = [tag for tag in tags if tag.ids[: len(tag_ids)] == tag_ids]
        if matching:
            self._tag_prefix.append(token_id)
            if matching[0].ids == tag_ids:
                self._held, self._tag_prefix = [], []
                if matching[0] is self._format.opening:
                    self._begin_thought()
                else:
                    self._phase = "answer"
            return []
        self._held.append((token_id, text))
        text_so_far = "".join(each for _, each in self._held).lstrip(_WHITESPACE)
        opening = self._format.opening
        if not opening.by_token and text_so_far.startswith(opening.text):
            self._held = []
            self._begin_thought()
            return [(None, text_so_far[len(opening.text) :])]
        if not text_so_far or (not opening.by_token and opening.text.startswith(text_so_far)):
            return []
        self._phase = "answer"
        held, self._held = self._held, []
        return held

    def _begin_thought(self) -> None:
        self._phase, self.tokens = "thought", self._count

    def _read_thought(self, token_id: int | None, text: str) -> tuple[str, TextPieces]:
        self.tokens = self._count
        closing, opening = self._format.closing, self._format.opening
        if token_id is not None and not self.reasoning and (token_id,) == opening.ids:
            return "", []  # the model repeats the opening tag that the template has rendered
        if closing.by_token:
            tag_ids = (*self._tag_prefix, token_id)
            if closing.ids[: len(tag_ids)] == tag_ids:
                self._tag_prefix.append(tag_ids[-1] or 0)
                if tag_ids == closing.ids:
                    self._end_thought()
                return "", []
            self._tag_prefix = []
            return self._emit_thought_text(text, held=""), []
        before, found, rest = (self._text + text).partition(closing.text)
        if found:
            self._end_thought()
            return self._show(before.rstrip()), [(None, rest)] if rest else []
        begins = (closing.text[:size] for size in range(len(closing.text) - 1, 0, -1))
        held = next((begin for begin in begins if before.endswith(begin)), "")
        self._text = ""
        return self._emit_thought_text(before.removesuffix(held), held), []

    def _emit_thought_text(self, text: str, held: str) -> str:
        seen = self._text + text
        stripped = seen.rstrip()
        self._text = seen[len(stripped) :] + held
        return self._show(stripped)

    def _show(self, text: str) -> str:
        emitted = text if self.reasoning else text.lstrip()
        self.reasoning += emitted
        return emitted

    def _end_thought(self) -> None:
        self._tag_prefix, self._stripping = [], True
        self._phase = "bridge" if self._format.bridge is not None else "answer"

    def _skip_bridge(self) -> None:
        assert self._format.bridge is not None
        self.tokens = self._count
        self._tag_prefix.append(0)
        if len(self._tag_prefix) == len(self._format.bridge.ids):
            self._phase = "answer"

    def _strip_leading_space(self, pieces: TextPieces) -> TextPieces:
        """The answer's pieces without white space between reasoning and answer."""
        if not self._stripping:
            return pieces
        kept: TextPieces = []
        for token_id, text in pieces:
            visible = text.lstrip() if self._stripping else text
            self._stripping = self._stripping and not visible
            kept.append((token_id, visible))
        return kept
