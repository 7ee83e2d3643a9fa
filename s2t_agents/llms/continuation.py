"""The greedy continuation of one candidate, and where it ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from torch import Tensor

from ..grammar.grammar import Grammar
from ..greedy import argmax
from ..scheduling.sequence import TokenSequence

SENTENCE_ENDS = (".", "!", "?")
"""Ends of a sentence if white space follows, so not in ``3.14``."""
HARD_ENDS = ("\n", "\u3002", "\uff01", "\uff1f")
"""Ends of a sentence in any case: a line break, or a CJK full stop."""


class GreedyContinuation:
    """A candidate and its greedy continuation.

    It ends with the sentence, the line or the answer. Tokens that a grammar forces do not end it, such as the line
    break inside a tool call.

    Args:
        prefix: the prefix, for its tokenizer and end tokens.
        candidate: the first token.
        grammar: the state before the candidate, not modified; None permits all.

    Attributes:
        tokens: token ids so far.
        finished: whether it has ended.
    """

    def __init__(self, prefix: TokenSequence, candidate: int, grammar: Grammar | None) -> None:
        self._prefix = prefix
        self._grammar = grammar.fork() if grammar is not None else None
        self._forced: deque[int] = deque()
        self.tokens: list[int] = []
        self.finished = False
        self._accept(candidate)

    def advance(self, logits: Tensor) -> None:
        """Append the next token, unless the continuation ends here.

        Args:
            logits: ``[V]``, the SLM's after the last token.
        """
        if self._forced:
            self._append(self._forced.popleft())
            return
        token = self._grammar.best(logits) if self._grammar is not None else argmax(logits)
        if self._ends_sentence_before(token):
            self.finished = True
        else:
            self._accept(token)

    def _accept(self, token: int) -> None:
        grammar = self._grammar
        if grammar is not None and token not in self._prefix.model.eos_ids:
            grammar.accept(token)
            self._forced.extend(grammar.forced())
            for forced in self._forced:
                grammar.accept(forced)
        self._append(token)

    def _append(self, token: int) -> None:
        self.tokens.append(token)
        self.finished = not self._forced and self._is_at_end()

    def _is_at_end(self) -> bool:
        """Whether the answer or the line has ended."""
        if self._grammar is not None and self._grammar.finished:
            return True
        prefix = self._prefix
        return self.tokens[-1] in prefix.model.eos_ids or decode_without_eos(prefix, self.tokens).endswith(HARD_ENDS)

    def _ends_sentence_before(self, following: int) -> bool:
        """Whether a sentence has ended, judged by the following token: white space, or the end of the answer."""
        prefix = self._prefix
        if not decode_without_eos(prefix, self.tokens).endswith(SENTENCE_ENDS):
            return False
        return following in prefix.model.eos_ids or decode_without_eos(prefix, [following])[:1].isspace()


def decode_without_eos(prefix: TokenSequence, tokens: Sequence[int]) -> str:
    """Tokens as text, without end tokens."""
    eos = prefix.model.eos_ids
    return str(prefix.model.tokenizer.decode([token for token in tokens if token not in eos]))
