"""What is put to a large model, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..scheduling.sequence import Prefix
from ..types import Candidate, Charge, Price
from .constraint import Constraint


@dataclass(eq=False)
class Question:
    """Which of these candidates comes next? Asked once.

    Attributes:
        ids: the prefix, as token ids.
        candidates: ``[K]`` token ids, the SLM's best first.
        prefix: the SLM's own view of the prefix, for those who need text or continuations; read-only.
        slm: ``[K]`` log-probabilities of the SLM.
        selector: ``[K]`` scores of the local selector; None without one.
        grammar: what may follow the prefix, for those who need continuations; forked, never moved. None permits all.
        seconds: left until the answer is of no use; None sets no limit.
        owed: what must be paid although there may be no answer; None while nothing is owed.
    """

    ids: Sequence[int]
    candidates: Sequence[int]
    prefix: Prefix | None = None
    slm: Sequence[float] = ()
    selector: Sequence[float] | None = None
    grammar: Constraint | None = None
    seconds: float | None = None
    owed: Charge | None = None

    def owe(self, charge: Charge | None) -> None:
        """From here on this is owed, whether an answer comes or not: the budget is settled with the last word.

        A session says it as soon as the LLM may have begun to work (the worst case), and again when it knows better.
        """
        self.owed = charge


@dataclass(frozen=True, slots=True)
class Answer:
    """What the LLM said.

    Attributes:
        scores: ``[K]`` log-probabilities of the candidates, None where it gave none; at least one is a number. A
            judge gives 0 to the one it named.
        then: tokens that follow the best candidate and are settled with it.
        note: what a reader of the receipt should know; empty when there is nothing.
    """

    scores: tuple[float | None, ...]
    then: tuple[int, ...] = ()
    note: str = ""


def candidates_of(question: Question, answer: Answer | None) -> tuple[Candidate, ...]:
    """``[K]``: the candidates with every score that they have got, the SLM's best first."""
    nothing = [None] * len(question.candidates)
    llm = answer.scores if answer else nothing
    columns = zip(question.candidates, question.slm, question.selector or nothing, llm, strict=True)
    return tuple(Candidate(*column) for column in columns)


def charge(price: Price | None, *, input_tokens: int, cached_tokens: int = 0, output_tokens: int = 1) -> Charge:
    """What so many tokens cost; tokens that the LLM had in its cache are paid for at their own price, not counted.

    Args:
        price: None leaves the dollars unknown.
        input_tokens: the whole prompt, cached tokens included.
        cached_tokens: how many of them were cached.
        output_tokens: tokens written.
    """
    usd = (
        price.cost(input_tokens=input_tokens, cached_tokens=cached_tokens, output_tokens=output_tokens)
        if price is not None
        else None
    )
    return Charge(usd=usd, llm_tokens=input_tokens - cached_tokens + output_tokens)
