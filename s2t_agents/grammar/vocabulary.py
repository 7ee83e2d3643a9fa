"""A tokenizer's vocabulary as llguidance reads it, with the search for completions over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from llguidance import LLTokenizer
from llguidance.hf import from_tokenizer

from ..errors import ConfigError
from ..fork_safety import delay_fork
from ..formats.tool_calls import tag_ids
from ..tokenization.safe_encoding import SafeEncoder
from ..tokenization.vocabulary import fill_unused_ids
from .completion_search import CompletionSearch
from .matcher import Matcher


class Vocabulary:
    """A tokenizer prepared for llguidance.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        size: number of logits of the model, V; by default the highest token id + 1.
        eos_ids: tokens that end the answer; the tokenizer's by default.

    Raises:
        ConfigError: a tokenizer that llguidance does not support.
    """

    def __init__(self, tokenizer: Any, size: int | None = None, eos_ids: Sequence[int] | None = None) -> None:
        self.tags = tag_ids(tokenizer)
        self.eos_ids = frozenset(eos_ids if eos_ids is not None else [tokenizer.eos_token_id])
        self.size = size or max(tokenizer.get_vocab().values()) + 1
        self.llguidance_tokenizer = self._llguidance_tokenizer(fill_unused_ids(tokenizer))
        added = tokenizer.added_tokens_decoder
        texts = ["" if i in added else self.llguidance_tokenizer.decode_str([i]) for i in range(self.size)]
        self.longest = max(len(text.encode()) for text in texts)
        self.completion_search = CompletionSearch(texts, enders={self.tags[1]} if self.tags[1] is not None else set())

    def _llguidance_tokenizer(self, tokenizer: Any) -> LLTokenizer:
        """llguidance's tokenizer, in which no text is a control token."""
        ends = sorted(self.eos_ids)
        described = SafeEncoder(tokenizer, str(tokenizer.chat_template or "")).grammar_tokenizer_json()
        try:
            if described is not None:
                return LLTokenizer(described, n_vocab=self.size, eos_token=ends)
            llguidance_tokenizer: LLTokenizer = from_tokenizer(tokenizer, n_vocab=self.size, eos_token=ends)
        except ValueError as error:
            raise ConfigError(
                f"A grammar cannot read this tokenizer: {error}.", hint="Use the tokenizer.json of the model's makers."
            ) from error
        return llguidance_tokenizer

    def encode_answers(self, answers: Sequence[Sequence[str | int]]) -> list[list[int]]:
        """Token ids of answers that are given as texts and token ids."""
        encode = self.llguidance_tokenizer.tokenize_str
        with delay_fork:
            return [
                [i for part in each for i in ([part] if isinstance(part, int) else encode(part))] for each in answers
            ]

    def completes(self, matcher: Matcher, tokens: Sequence[int]) -> bool:
        """Whether these tokens complete an answer from a matcher's state on; the state does not change."""
        return self.count_completing(matcher, tokens) > len(tokens)

    def count_completing(self, matcher: Matcher, tokens: Sequence[int]) -> int:
        """How many of these tokens are legal in sequence, and one more if they complete an answer."""
        return matcher.validate_tokens([*tokens, self.llguidance_tokenizer.eos_token])


_VOCABULARIES: WeakKeyDictionary[Any, dict[Any, Vocabulary]] = WeakKeyDictionary()


def cached_vocabulary(tokenizer: Any, size: int | None = None, eos_ids: Sequence[int] | None = None) -> Vocabulary:
    """The tokenizer's ``Vocabulary``, made once per tokenizer, size and end tokens."""
    known = _VOCABULARIES.setdefault(tokenizer, {})
    key = (size, tuple(sorted(eos_ids)) if eos_ids is not None else None)
    if key not in known:
        known[key] = Vocabulary(tokenizer, size, eos_ids)
    return known[key]
