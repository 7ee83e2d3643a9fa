"""The LLM of an evaluation: it reads prompts once for all rows, and charges each answer as a conversation of its own.

LocalLLM            every conversation's KV is its own
CountedLLM          prompts are shared through the model's prefix cache, and what a question costs does not show it
TakeoverLLM         the LLM's own best token, whether the SLM proposed it or not
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, inf

from ..llms.local_llm import LocalLLM, LocalSession
from ..llms.question import Answer, Question
from ..llms.token_map import ComparedTokens
from ..scheduling.language_model import LanguageModel
from ..scheduling.prefix_cache import common_prefix
from ..scheduling.sequence import TokenSequence
from ..scheduling.waits import Waiting


class CountedLLM(LocalLLM):
    """One for each answer.

    Args:
        model: loaded.
        like: another one of the same model, whose tokens were compared before; None has none.

    Attributes:
        asked: the longest sequence that it was last asked about: these tokens are paid for.
    """

    def __init__(self, model: LanguageModel, like: ComparedTokens | None = None) -> None:
        super().__init__(model)
        if like is not None:
            self.know_as(like)
        self.asked: Sequence[int] = ()

    def open(self) -> CountedSession:
        """A session with KV that starts in the prefix cache."""
        return CountedSession(self)


class CountedSession(LocalSession):
    """One turn of an answer."""

    def __init__(self, llm: CountedLLM) -> None:
        super().__init__(llm)
        self._counted = llm
        self._sequence: TokenSequence | None = None

    def uncached_tokens(self, ids: Sequence[int], scope: str | None = None) -> int:
        """Tokens that this answer has not paid for yet."""
        return len(ids) - common_prefix(self._counted.asked, ids)

    def reading(self, model: LanguageModel, ids: Sequence[int], scope: str | None) -> Waiting[Tensor]:
        """See ``LocalSession``."""
        if self._sequence is None:
            self._sequence = yield from TokenSequence.from_prefix_cache(model, ids, scope)
        yield from self._sequence.moving_to(ids)
        self._counted.asked = list(ids)
        return self._sequence.logits

    def close(self) -> None:
        """Leave the KV to the prefix cache."""
        if self._sequence is not None:
            self._sequence.__exit__(None, None, None)
            self._sequence = None


class TakeoverLLM(CountedLLM):
    """Writes the token itself."""

    def open(self) -> TakeoverSession:
        """A session."""
        return TakeoverSession(self)


class TakeoverSession(CountedSession):
    """The LLM's best token that is legal."""

    def asking(self, question: Question) -> Waiting[Answer]:
        """See ``LocalSession``."""
        answer = yield from super().asking(question)
        assert self._sequence is not None
        assert question.prefix is not None
        slm = question.prefix
        width = min(slm.model.vocab_size, self._sequence.model.vocab_size)
        logits = self._sequence.logits[:width]
        legal = question.grammar.allowed(slm.logits) if question.grammar else slm.model.with_text
        if legal is not None:
            logits = logits.masked_fill(~legal[:width].to(logits.device), -inf)
        return replace(answer, instead=int(logits.argmax()))
