"""From the SLM's tokens to what an LLM of another family has for them: bytes, or control tokens of the same role."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from ..backends.fingerprint import shared_ids
from ..endpoints.tokenizer_check import Tokenizing
from ..errors import EscalationFailed, TokenizerMismatch
from ..formats.reasoning import ReasoningFormat, Tag
from ..formats.tool_calls import CLOSE, OPEN
from ..scheduling.language_model import LanguageModel
from ..tokenization.byte_tokenizer import ByteTokenizer, refuse_changed_bytes
from .covering import Places

Counterpart = bytes | frozenset[int] | None
"""Bytes; control tokens of the LLM, any of which has the role; None where the LLM has nothing like it."""


PLAIN = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] | capitalize }}:\n{{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
"""How a model without a chat template reads a conversation."""


@dataclass(frozen=True)
class Side:
    """One model of the two.

    Attributes:
        tokenizer: fast.
        eos_ids: tokens that end an answer.
        view: its bytes.
        template: source of its chat template; None takes those that its tokenizer has by name.
    """

    tokenizer: Any
    eos_ids: frozenset[int]
    view: ByteTokenizer
    template: str | None

    @cached_property
    def reasoning(self) -> ReasoningFormat | None:
        """How it writes thoughts."""
        return ReasoningFormat.of(self.tokenizer, self.template or str(self.tokenizer.chat_template))

    @cached_property
    def control(self) -> dict[str, int]:
        """Its control tokens by their spelling."""
        vocabulary = self.tokenizer.get_vocab()
        return {
            token: i for token, i in vocabulary.items() if i < len(self.view.bytes_of) and not self.view.bytes_of[i]
        }


@dataclass(frozen=True)
class Run:
    """A part of the answer so far: text, and then a control token of the LLM if one follows.

    Attributes:
        text: as bytes.
        control: the token after it; None at the end.
    """

    text: bytes
    control: int | None = None


class TokenMap:
    """Counterparts of the SLM's tokens in the LLM.

    End of turn and end of text stand for each other; so do the tags of thoughts. A control token that both families
    spell alike stands for itself. Tags of calls and thoughts that the LLM has no token for are text to it.

    Args:
        slm: the small model.
        llm: the large one.

    Attributes:
        slm: as given.
        llm: as given.
        places: where the LLM's tokens may end.
    """

    def __init__(self, slm: Side, llm: Side) -> None:
        self.slm, self.llm = slm, llm
        self.places = Places(llm.view)
        self._spelling = {i: token for token, i in slm.control.items()}
        self._tags: dict[str, Counterpart] = {tag: tag.encode() for tag in (OPEN, CLOSE)}
        if slm.reasoning is not None:
            ours, theirs = slm.reasoning, llm.reasoning
            self._tags[ours.opening.text] = _written(theirs.opening if theirs else ours.opening, theirs is not None)
            self._tags[ours.closing.text] = _written(theirs.closing if theirs else ours.closing, theirs is not None)

    def of(self, token: int) -> Counterpart:
        """What the LLM has for a token."""
        data = self.slm.view.bytes_of[token] if token < len(self.slm.view.bytes_of) else None
        if data:
            return data
        if token in self.slm.eos_ids:
            return self.llm.eos_ids
        spelling = self._spelling.get(token, "")
        if spelling in self.llm.control:
            return frozenset({self.llm.control[spelling]})
        return self._tags.get(spelling)

    def runs(self, ids: Sequence[int]) -> list[Run]:
        """The SLM's tokens as texts and control tokens of the LLM; the last one is text, maybe none.

        A control token that the LLM has nothing for is text to it.
        """
        found, text = [], b""
        for token in ids:
            counterpart = self.of(token)
            if counterpart is None or (isinstance(counterpart, frozenset) and not counterpart):
                text += self._spelling.get(token, "").encode()
            elif isinstance(counterpart, bytes):
                text += counterpart
            else:
                found.append(Run(text, min(counterpart)))
                text = b""
        return [*found, Run(text)]


class ComparedTokens(ABC):
    """An LLM whose tokens may be others than the SLM's; two tokenizers are compared once, whatever is asked.

    Attributes:
        name: of the LLM.
    """

    name: str

    def __init__(self) -> None:
        self._same: dict[str, bool] = {}  # by the fingerprint of the SLM's tokenizer
        self._maps: dict[str, TokenMap] = {}

    @abstractmethod
    def given_tokenizer(self) -> Any:
        """Its tokenizer, without reading weights; None where it was not said to be another than the SLM's."""

    @abstractmethod
    def side(self) -> Side:
        """Its side of a map; errors as ``side_of``, and ``EscalationFailed`` where it cannot be loaded."""

    def know_as(self, other: ComparedTokens) -> None:
        """Share with another LLM of the same tokenizer what either has compared."""
        self._same, self._maps = other._same, other._maps

    def check(self, slm: Tokenizing) -> None:
        """Compare the tokenizers, without reading weights.

        Raises:
            TokenizerMismatch: they differ, and one of them cannot be followed byte by byte.
            ModelNotFound: the LLM has no tokenizer.
        """
        if not self.shares_tokens(slm):
            refuse_changed_bytes(slm.tokenizer, slm.name)
            refuse_changed_bytes(self.given_tokenizer(), self.name)

    def shares_tokens(self, slm: Tokenizing) -> bool:
        """Whether every token of the SLM has the same id there, as far as it was said."""
        known = slm.tokenizer_fingerprint
        if known not in self._same:
            tokenizer = self.given_tokenizer()
            self._same[known] = tokenizer is None or not shared_ids(slm.tokenizer, tokenizer)
        return self._same[known]

    def token_map(self, slm: LanguageModel) -> TokenMap | None:
        """Between the SLM's tokens and the LLM's; None where they are the same.

        Raises:
            EscalationFailed: the LLM cannot be loaded, or a tokenizer cannot be followed byte by byte.
        """
        if self.shares_tokens(slm):
            return None
        known = slm.tokenizer_fingerprint
        if known not in self._maps:
            try:
                self._maps[known] = TokenMap(side_of(slm, None), self.side())
            except TokenizerMismatch as error:
                raise EscalationFailed(f"{self.name!r} cannot be asked: {error}") from error
        return self._maps[known]


def _written(tag: Tag, known: bool) -> Counterpart:
    """A tag of thoughts as the LLM writes it."""
    if known and tag.by_token and len(tag.ids) == 1:
        return frozenset(tag.ids)
    return tag.text.encode()


def side_of(model: LanguageModel, chat_template: str | None) -> Side:
    """A model as one of the two.

    Args:
        model: loaded.
        chat_template: source that replaces its tokenizer's.

    Raises:
        TokenizerMismatch: see ``ByteTokenizer``.
    """
    return side_of_tokens(model.tokenizer, model.eos_ids, model.name, chat_template, rows=model.vocab_size)


def side_of_tokens(
    tokenizer: Any, eos_ids: frozenset[int], name: str, chat_template: str | None, *, rows: int | None = None
) -> Side:
    """A model as one of the two, by its tokenizer.

    Args:
        tokenizer: fast.
        eos_ids: tokens that end an answer.
        name: of the model.
        chat_template: source that replaces the tokenizer's.
        rows: columns of its logits; None takes all ids of the tokenizer.

    Raises:
        TokenizerMismatch: see ``ByteTokenizer``.
    """
    own = tokenizer.chat_template
    template = chat_template or (own if isinstance(own, str) else None if own else PLAIN)
    size = 1 + max(tokenizer.get_vocab().values()) if rows is None else rows
    return Side(tokenizer, eos_ids, _view(tokenizer, size, name, template or str(own)), template)


@lru_cache(maxsize=8)
def _view(tokenizer: Any, rows: int, name: str, template: str) -> ByteTokenizer:
    return ByteTokenizer(tokenizer, rows, name=name, template=template)
