"""One candidate's continuation while it grows: what it takes next, and where it ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from ..scheduling.sequence import Prefix
from .constraint import Constraint

STOPS = (".", "!", "?")
"""A sentence ends with one of these where a blank follows; ``3.14`` goes on."""
FULL_STOPS = ("\n", "\u3002", "\uff01", "\uff1f")
"""It ends with a line, or with a CJK full stop, whatever follows."""


class Branch:
    """A candidate and what follows it.

    It ends with its sentence, its line or the answer. What a grammar forces belongs to what it follows: the line break
    inside a tool call ends nothing.

    Args:
        prefix: what it continues; for the tokenizer and the end tokens.
        candidate: the first token.
        grammar: the state before it, left as it is; None permits all.

    Attributes:
        tokens: so far.
        over: nothing may follow.
    """

    def __init__(self, prefix: Prefix, candidate: int, grammar: Constraint | None) -> None:
        self._prefix = prefix
        self._grammar = grammar.fork() if grammar is not None else None
        self._forced: deque[int] = deque()
        self.tokens: list[int] = []
        self.over = False
        self._choose(candidate)

    def follow(self, logits: Tensor) -> None:
        """One token more, unless it ends here.

        Args:
            logits: ``[V]``, the SLM's after the last token.
        """
        if self._forced:
            self._take(self._forced.popleft())
            return
        if self._grammar is not None and (allowed := self._grammar.allowed(logits)) is not None:
            logits = logits.masked_fill(~allowed.to(logits.device), -torch.inf)
        token = int(logits.argmax())
        if self._sentence_over(token):
            self.over = True
        else:
            self._choose(token)

    def _choose(self, token: int) -> None:
        grammar = self._grammar
        if grammar is not None and token not in self._prefix.model.eos_ids:
            grammar.accept(token)
            self._forced.extend(grammar.forced())
            for forced in self._forced:
                grammar.accept(forced)
        self._take(token)

    def _take(self, token: int) -> None:
        self.tokens.append(token)
        self.over = not self._forced and self._ends()

    def _ends(self) -> bool:
        """Nothing may follow: the answer is over, or the line is."""
        if self._grammar is not None and self._grammar.finished:
            return True
        prefix = self._prefix
        return self.tokens[-1] in prefix.model.eos_ids or plain(prefix, self.tokens).endswith(FULL_STOPS)

    def _sentence_over(self, following: int) -> bool:
        """It ends a sentence, and what follows begins another or ends the answer."""
        prefix = self._prefix
        if not plain(prefix, self.tokens).endswith(STOPS):
            return False
        return following in prefix.model.eos_ids or plain(prefix, [following])[:1].isspace()


def plain(prefix: Prefix, tokens: Sequence[int]) -> str:
    """Tokens as text, end tokens left out."""
    eos = prefix.model.eos_ids
    return str(prefix.model.tokenizer.decode([token for token in tokens if token not in eos]))
