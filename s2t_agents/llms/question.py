"""The question to an LLM, and its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..formats.reasoning import ReasoningFormat
from ..grammar.grammar import Grammar
from ..scheduling.sequence import TokenSequence
from ..types import Candidate, Charge


class Conversation(Protocol):
    """What the SLM answers, for an LLM that reads it in its own way."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the SLM's prompt; those after it are its answer so far."""
        ...

    def prompt_for(self, tokenizer: Any, template: str | None, reasoning: ReasoningFormat | None) -> list[int]:
        """The conversation, tools included, up to the beginning of the answer, as another model reads it.

        Args:
            tokenizer: the other model's.
            template: source of its chat template; None takes the tokenizer's own.
            reasoning: how it writes thoughts, which are open at the end where the SLM's are.

        Raises:
            InputError, ConfigError: the template cannot write it.
        """
        ...


@dataclass(eq=False)
class Question:
    """Which of these candidates comes next? Asked once.

    Attributes:
        ids: the prefix as token ids.
        candidates: ``[K]`` token ids, the SLM's best first.
        prefix: the SLM's sequence, for LLMs that need text or continuations; read-only.
        slm: ``[K]`` log-probabilities of the SLM.
        selector: ``[K]`` scores of the local selector; None without one.
        grammar: the state after the prefix, for continuations; forked, never advanced. None permits all.
        seconds: deadline of the answer; None sets none.
        owed: cost incurred so far, whether an answer comes or not; None while nothing is owed.
        conversation: what ``ids`` answers, for an LLM of another family; None where they are all there is.
    """

    ids: Sequence[int]
    candidates: Sequence[int]
    prefix: TokenSequence | None = None
    slm: Sequence[float] = ()
    selector: Sequence[float] | None = None
    grammar: Grammar | None = None
    seconds: float | None = None
    owed: Charge | None = None
    conversation: Conversation | None = None

    @property
    def scope(self) -> str | None:
        """Its cache scope; None for the default scope."""
        return self.prefix.scope if self.prefix is not None else None

    def owe(self, charge: Charge | None) -> None:
        """Report the cost incurred so far, whether an answer comes or not; the budget is settled with the last report.

        A session reports the maximum once the LLM may have begun to work, and the actual cost when it is known. An
        answer without any report costs its quote.
        """
        self.owed = charge


@dataclass(frozen=True, slots=True)
class Answer:
    """The LLM's scores of the candidates.

    Attributes:
        scores: ``[K]`` log-probabilities of the candidates, None if it gave none; at least one is a number. A judge
            gives 0 to the one that it chose.
        then: tokens that follow the best candidate and are emitted with it.
        instead: a token that the LLM wrote itself, in place of all candidates; it is legal. None picks a candidate.
        note: a remark for the receipt; "" for none.
    """

    scores: tuple[float | None, ...]
    then: tuple[int, ...] = ()
    note: str = ""
    instead: int | None = None


def candidates_of(question: Question, answer: Answer | None) -> tuple[Candidate, ...]:
    """``[K]``: the candidates with all their scores, the SLM's best first."""
    nothing = [None] * len(question.candidates)
    llm = answer.scores if answer else nothing
    columns = zip(question.candidates, question.slm, question.selector or nothing, llm, strict=True)
    return tuple(Candidate(*column) for column in columns)
