"""One generation's KV cache in an LLM on this machine: taken over from the turn before, left to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ..errors import EscalationFailed, first_line
from ..scheduling.idle_sequences import IdleSequences
from ..scheduling.language_model import LanguageModel
from ..scheduling.sequence import TokenSequence


class KeptPrefix:
    """The sequence of one generation, extended lazily.

    Args:
        load: gives the LLM.
        idle: sequences of generations that have ended.
    """

    def __init__(self, load: Callable[[], LanguageModel], idle: IdleSequences) -> None:
        self._load, self._idle = load, idle
        self._sequence: TokenSequence | None = None

    def found(self, ids: Sequence[int], scope: str | None) -> TokenSequence | None:
        """The generation's sequence, at first the idle one that shares most with ``ids``; None where there is none."""
        if self._sequence is None:
            self._sequence = self._idle.take(ids, scope)
        return self._sequence

    def take(self, ids: Sequence[int], scope: str | None) -> TokenSequence:
        """``found``, or a new one; errors as ``load``."""
        sequence = self.found(ids, scope)
        if sequence is None:
            sequence = self._sequence = TokenSequence(self._load(), scope)
        return sequence

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Context of one question's forwards.

        Raises:
            EscalationFailed: the device failed (out of memory).
        """
        try:
            yield
        except RuntimeError as error:
            self._sequence = None  # its KV cache may be inconsistent
            raise EscalationFailed(f"the LLM broke down on this machine: {first_line(error)}.") from error

    def close(self) -> None:
        """Leave the KV cache to the next turn."""
        if self._sequence is not None:
            self._idle.put(self._sequence)
            self._sequence = None


def check_fits(model: LanguageModel, prefix: int, tree: int = 0) -> None:
    """Refuse a prefix of so many tokens, and a tree after it, that leave no room in the LLM's context window.

    Raises:
        EscalationFailed: naming both.
    """
    if prefix + tree >= model.context_window:
        raise EscalationFailed(f"a prefix of {prefix} tokens does not fit the LLM's context of {model.context_window}.")
