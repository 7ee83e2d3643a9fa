"""Protocols of an LLM that picks among candidates: it costs money, may be remote, and may fail."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from ..scheduling.language_model import LanguageModel
from ..scheduling.waits import Waiting, finish
from ..types import Charge, Price
from .question import Answer, Question


class LLMSession(Protocol):
    """The LLM's side of one generation; may hold a KV cache.

    One whose ``quote`` takes work may have a method ``least(question) -> Charge``, a cost that no quote for it
    is below: where the budget has no room for it, no quote is asked for.
    """

    def quote(self, question: Question) -> Charge | None:
        """The maximum cost of the question, which the budget reserves; None if there is nothing to choose.

        Raises:
            EscalationFailed: the LLM cannot answer, so it is not asked.
        """
        ...

    def ask(self, question: Question) -> Answer:
        """Ask the LLM. The cost, also of a failed question, is reported by ``question.owe``; at most the quote.

        An answer of which no cost was reported costs the quote; a free one reports a ``Charge`` of zero. A failed
        question of which none was reported costs nothing.

        Raises:
            EscalationFailed: no usable answer.
        """
        ...

    def close(self) -> None:
        """Release the session's resources at the end of the generation."""
        ...


class WaitingSession(ABC):
    """An ``LLMSession`` whose questions wait for forwards of a model on this machine."""

    @abstractmethod
    def asking(self, question: Question) -> Waiting[Answer]:
        """``ask``, to wait for."""

    def ask(self, question: Question) -> Answer:
        """See ``LLMSession``."""
        return finish(self.asking(question))


def asking(session: LLMSession, question: Question) -> Waiting[Answer]:
    """The answer of any session; one that is no ``WaitingSession`` blocks."""
    if isinstance(session, WaitingSession):
        return (yield from session.asking(question))
    return session.ask(question)


class LLMSelector(Protocol):
    """An LLM that picks among candidates.

    If it has a time limit per question, it gives it in seconds as an attribute ``timeout_s``: a budget's hold lasts
    longer than that, and an hour if there is no such attribute.

    Its ``repr``, where its class writes one, is part of the key of LangChain's cache and so tells every setting that
    changes an answer; without one, an object shares cached answers with no other.

    Attributes:
        name: for reports.
        price: of its tokens; None if unknown.
    """

    name: str
    price: Price | None

    def check(self, slm: LanguageModel) -> None:
        """Refuse an SLM whose candidates it cannot score, before anything is spent.

        Raises:
            TokenizerMismatch: their tokens cannot be compared.
        """
        ...

    def open(self) -> LLMSession:
        """A session for one generation."""
        ...
