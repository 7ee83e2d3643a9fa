"""How a model thinks before it answers: the tags around its thought, and a reader that tells thought from answer.

The tags are found in the vocabulary and in the chat template; no list of model names is needed. Where the vocabulary
holds a tag as one token, that token alone is the tag, and the same letters spelt out are text; where it does not, the
letters are the tag, wherever token borders fall.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

from ..errors import ConfigError

Place = Literal["undecided", "thought", "answer"]
"""Where a prompt leaves the model: before either, so that the model decides; in a thought that the template has
opened; in the answer, as where the template has closed the thought or the channel of the answer is open."""

_TAG = re.compile(
    r"(?P<left>[<\[◁])(?P<outer>/?)(?P<bar>\|?)(?P<inner>/?)"
    r"(?P<name>(?:\w+:)?(?:(?:begin|start|end)(?:_of)?_)?(?:think|thinking|thoughts?|reasoning)(?:_(?:begin|start|end))?)"
    r"(?P<right>\|?[>\]▷])",
    re.IGNORECASE,
)
_ENDS = {"begin": "end", "start": "end", "BEGIN": "END", "START": "END"}

_CHANNELS = (  # tokens that tell of a format, and what it writes: opening, closing, then the answer; the answer alone
    (
        ("<|channel|>", "<|message|>", "<|start|>", "<|end|>"),  # OpenAI's harmony
        "<|channel|>analysis<|message|>",
        "<|end|>",
        "<|start|>assistant<|channel|>final<|message|>",
        "<|channel|>final<|message|>",
    ),
    (("<|channel>", "<channel|>"), "<|channel>thought\n", "<channel|>", "", ""),  # Gemma 4
)

Pieces = list[tuple[int | None, str]]
"""Tokens and the texts that they add; text whose token is told already has None."""

_SPACE = " \t\n\r\v\f"

_VARIABLES = ("reasoning_content", "thinking", "reasoning", "thought")
"""What templates call the thought of an assistant's turn; the first that a template reads is written."""


@dataclass(frozen=True)
class Tag:
    """A tag as its model writes it.

    Attributes:
        text: its letters.
        ids: its tokens.
        by_token: whether tokens of its own mark it; otherwise its letters are ordinary text to the tokenizer.
    """

    text: str
    ids: tuple[int, ...]
    by_token: bool

    @classmethod
    def of(cls, text: str, tokenizer: Any) -> Tag:
        """The tag in a tokenizer's tokens."""
        ids = tuple(tokenizer.encode(text, add_special_tokens=False))
        added = tokenizer.added_tokens_decoder
        return cls(text, ids, any(i in added and added[i].content.strip() for i in ids))


@dataclass(frozen=True)
class ReasoningFormat:
    """How a model writes its thoughts.

    Attributes:
        opening: begins a thought; the model writes it, or the template does.
        closing: ends it.
        bridge: what the format dictates between the thought and the answer, such as the channel of the answer.
        bare: what it dictates before an answer without a thought.
    """

    opening: Tag
    closing: Tag
    bridge: Tag | None = None
    bare: Tag | None = None

    @classmethod
    def of(cls, tokenizer: Any, template: str) -> ReasoningFormat | None:
        """The format of a tokenizer's models, or None where neither vocabulary nor template knows of thoughts.

        Args:
            tokenizer: a fast Hugging Face tokenizer.
            template: the chat template's source.
        """
        added = {token.content for token in tokenizer.added_tokens_decoder.values()}
        for marks, opening, closing, bridge, bare in _CHANNELS:
            if added.issuperset(marks):
                rest = [Tag.of(text, tokenizer) if text else None for text in (bridge, bare)]
                return cls(Tag.of(opening, tokenizer), Tag.of(closing, tokenizer), *rest)
        pairs = tag_pairs(added, template)
        if not pairs:
            return None
        return cls(*(Tag.of(tag, tokenizer) for tag in pairs[0]))

    def place(self, tokenizer: Any, prompt: Sequence[int]) -> Place:
        """Where a prompt ends: the template may have opened the thought, or closed it."""
        tail = list(prompt[-64:])
        text = str(tokenizer.decode(tail, skip_special_tokens=False)).rstrip()

        def ends_with(tag: Tag | None) -> bool:
            if tag is None or not text.endswith(tag.text.rstrip()):
                return False
            return not tag.by_token or tag.ids[0] in tail[-len(tag.ids) - 8 :]

        if any(map(ends_with, (self.closing, self.bridge, self.bare))):
            return "answer"
        return "thought" if ends_with(self.opening) else "undecided"


def tag_pairs(added: set[str], template: str) -> list[tuple[str, str]]:
    """Tags of thoughts in pairs, the likeliest first: those that are tokens and that the template names.

    One that stands alone in the template, as where it only opens thoughts or only cuts old ones off, has its
    counterpart by its form.
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
    """The pairs of tags that a tag may belong to, the usual one first."""
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


def thinking_limit(given: Any) -> int | None:
    """A ``max_thinking_tokens``, None for no limit.

    Raises:
        ConfigError: it is no whole number from 0 on.
    """
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, Integral) or given < 0:
        raise ConfigError(
            f"max_thinking_tokens is {given!r}; it must be a whole number of tokens, 0 or more.",
            hint="0 closes every thought at once; None sets no limit beside max_tokens.",
        )
    return int(given)


def variable_of(template: str) -> str | None:
    """What a chat template calls the thought of an assistant's turn; None where it reads none."""
    read = set(re.findall(r"""(?:\.|\[\s*['"]|get\(\s*['"]|['"])(\w+)""", template))
    return next((name for name in _VARIABLES if name in read), None)


def thought_apart(content: str, tags: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    """Thought and answer of a content that begins with its thought between tags; None where it does not."""
    text = content.lstrip()
    for opening, closing in tags:
        if text.startswith(opening) and closing in text:
            thought, _, answer = text[len(opening) :].partition(closing)
            return thought.strip(), answer.lstrip("\n")
    return None


class ThoughtReader:
    """Reads one generation: its thought and its answer apart, as they stream.

    Tags are shown in neither; white space around the thought, and before an answer behind one, is dropped.

    Args:
        format: how the model thinks.
        place: where its prompt ends.

    Attributes:
        reasoning: the thought as shown so far.
        tokens: of the thought, with its tags and a token that holds both the closing tag's end and an answer's begin.
        thinking: whether the next token stands in the thought.
    """

    def __init__(self, format: ReasoningFormat, place: Place) -> None:
        self._format = format
        self._phase: Literal["undecided", "thought", "bridge", "answer"] = place
        self.reasoning = ""
        self.tokens = 0
        self._count = 0
        self._held: Pieces = []  # what may turn out to be the opening tag, or stand before it
        self._spoken: list[int] = []  # tokens of a tag that is under way
        self._text = ""  # of a thought: what may be the closing tag's begin, or space that only more text makes show
        self._dropping = False  # space between the thought and the answer

    @property
    def thinking(self) -> bool:
        """Whether the next token stands in the thought."""
        return self._phase in ("thought", "bridge")

    def push(self, token_id: int, text: str) -> tuple[str, Pieces]:
        """Take one step: its token and the text it added, which may or may not spell a tag token out.

        Returns:
            What it adds to the thought; tokens and texts that are the answer's.
        """
        self._count += 1
        shown: str = ""
        said: Pieces = []
        if self._phase == "undecided":
            said = self._decide(token_id, text)
            if self.thinking:
                rest, said = said[0][1] if said else "", []
                shown, said = self._think(None, rest)
        elif self._phase == "thought":
            shown, said = self._think(token_id, text)
        elif self._phase == "bridge":
            self._cross()
        else:
            said = [(token_id, text)]
        return shown, self._after_space(said)

    def finish(self, text: str) -> tuple[str, Pieces]:
        """The end of the generation: what was held back, and text that belongs to no token."""
        held, self._held = self._held, []
        if self.thinking:
            return self._show((self._text + text).rstrip()), []
        return "", self._after_space([*held, (None, text)])

    def _decide(self, token_id: int, text: str) -> Pieces:
        """Thought or answer? Returns what the answer begins with, or the thought's first text."""
        ways = [tag for tag in (self._format.opening, self._format.bare) if tag is not None and tag.by_token]
        spoken = (*self._spoken, token_id)
        begun = [tag for tag in ways if tag.ids[: len(spoken)] == spoken]
        if begun:
            self._spoken.append(token_id)
            if begun[0].ids == spoken:
                self._held, self._spoken = [], []
                if begun[0] is self._format.opening:
                    self._open()
                else:
                    self._phase = "answer"
            return []
        self._held.append((token_id, text))
        heard = "".join(each for _, each in self._held).lstrip(_SPACE)
        opening = self._format.opening
        if not opening.by_token and heard.startswith(opening.text):
            self._held = []
            self._open()
            return [(None, heard[len(opening.text) :])]
        if not heard or (not opening.by_token and opening.text.startswith(heard)):
            return []
        self._phase = "answer"
        held, self._held = self._held, []
        return held

    def _open(self) -> None:
        self._phase, self.tokens = "thought", self._count

    def _think(self, token_id: int | None, text: str) -> tuple[str, Pieces]:
        self.tokens = self._count
        closing, opening = self._format.closing, self._format.opening
        if token_id is not None and not self.reasoning and (token_id,) == opening.ids:
            return "", []  # opened again behind the template's own opening
        if closing.by_token:
            spoken = (*self._spoken, token_id)
            if closing.ids[: len(spoken)] == spoken:
                self._spoken.append(spoken[-1] or 0)
                if spoken == closing.ids:
                    self._close()
                return "", []
            self._spoken = []
            return self._more(text, held=""), []
        before, found, rest = (self._text + text).partition(closing.text)
        if found:
            self._close()
            return self._show(before.rstrip()), [(None, rest)] if rest else []
        begins = (closing.text[:size] for size in range(len(closing.text) - 1, 0, -1))
        held = next((begin for begin in begins if before.endswith(begin)), "")
        self._text = ""
        return self._more(before.removesuffix(held), held), []

    def _more(self, text: str, held: str) -> str:
        seen = self._text + text
        solid = seen.rstrip()
        self._text = seen[len(solid) :] + held
        return self._show(solid)

    def _show(self, text: str) -> str:
        shown = text if self.reasoning else text.lstrip()
        self.reasoning += shown
        return shown

    def _close(self) -> None:
        self._spoken, self._dropping = [], True
        self._phase = "bridge" if self._format.bridge is not None else "answer"

    def _cross(self) -> None:
        assert self._format.bridge is not None
        self.tokens = self._count
        self._spoken.append(0)
        if len(self._spoken) == len(self._format.bridge.ids):
            self._phase = "answer"

    def _after_space(self, said: Pieces) -> Pieces:
        """The answer without the space between it and the thought."""
        if not self._dropping:
            return said
        kept: Pieces = []
        for token_id, text in said:
            shown = text.lstrip() if self._dropping else text
            self._dropping = self._dropping and not shown
            kept.append((token_id, shown))
        return kept
