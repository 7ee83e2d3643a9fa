"""The question as put to a large model: paid for, perhaps far away, and allowed to fail."""

from __future__ import annotations

from typing import Protocol

from ..backends.torch.language_model import LanguageModel
from ..types import Charge, Price
from .question import Answer, Question


class LLMSession(Protocol):
    """One generation's line to the LLM."""

    def quote(self, question: Question) -> Charge | None:
        """The most that asking it can cost: what the budget holds. None: nothing to choose, so nobody is asked.

        Raises:
            EscalationFailed: it need not be asked; no answer would come.
        """
        ...

    def ask(self, question: Question) -> Answer:
        """Put it. What it costs, answered or not, is said to ``question.owe``; at most what was quoted.

        Raises:
            EscalationFailed: no usable answer.
        """
        ...

    def close(self) -> None:
        """The generation is over."""
        ...


class LLMSelector(Protocol):
    """A large model that picks among candidates.

    One that gives a question up by itself says after how many seconds in an attribute ``timeout_s``: budgets hold what
    a question may cost for longer than that, and for an hour where there is no such attribute.

    Attributes:
        name: for reports.
        price: of its tokens; None when unknown.
    """

    name: str
    price: Price | None

    def check(self, slm: LanguageModel) -> None:
        """Refuse an SLM that it cannot serve, before anything is spent.

        Raises:
            TokenizerMismatch: their token ids differ.
        """
        ...

    def open(self) -> LLMSession:
        """A session for one generation."""
        ...
