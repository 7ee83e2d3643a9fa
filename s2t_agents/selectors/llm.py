"""The question as put to a large model: paid for, perhaps far away, and allowed to fail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..models.language_model import LanguageModel
from ..types import Price


class LLMSession(Protocol):
    """One generation's line to the LLM. Remembers what the LLM has read, so that only the rest is paid for."""

    def uncached(self, ids: Sequence[int]) -> int:
        """Tokens of the prefix that the LLM has not read yet: what an escalation now would cost."""
        ...

    def scores(self, ids: Sequence[int], candidates: Sequence[int]) -> list[float]:
        """Log-probabilities of the candidates after the prefix ``ids``.

        Raises:
            EscalationFailed: no usable answer.
        """
        ...

    def close(self) -> None:
        """The generation is over."""
        ...


class LLMSelector(Protocol):
    """A large model that picks among candidates.

    Attributes:
        name: for reports.
        price: of its tokens; None when unknown.
    """

    name: str
    price: Price | None

    def check(self, slm: LanguageModel) -> None:
        """Refuse an SLM that it can not serve, before anything is spent.

        Raises:
            TokenizerMismatch: their token ids differ.
        """
        ...

    def open(self) -> LLMSession:
        """A session for one generation."""
        ...
