"""llguidance's matcher, whose calls a fork waits for: they run without the GIL and lock what all matchers share."""

from __future__ import annotations

from collections.abc import Sequence

from llguidance import LLMatcher, LLTokenizer

from ..fork_safety import uncut


class Matcher:
    """A state of a grammar, as ``llguidance.LLMatcher``.

    Args:
        core: llguidance's copy of a tokenizer.
        source: the grammar, in llguidance's Lark dialect.
    """

    def __init__(self, core: LLTokenizer, source: str) -> None:
        with uncut:
            self._own = LLMatcher(core, source, log_level=0)

    def deep_copy(self) -> Matcher:
        """A state of its own that begins here."""
        twin = Matcher.__new__(Matcher)
        with uncut:
            twin._own = self._own.deep_copy()
        return twin

    def is_error(self) -> bool:
        """Whether llguidance has given up, see ``get_error``."""
        return bool(self._own.is_error())

    def get_error(self) -> str:
        """llguidance's own words."""
        return str(self._own.get_error())

    def is_accepting(self) -> bool:
        """Whether what was taken is a whole text of the grammar."""
        with uncut:
            return bool(self._own.is_accepting())

    def is_stopped(self) -> bool:
        """Whether nothing more may come."""
        return bool(self._own.is_stopped())

    def consume_token(self, token_id: int) -> bool:
        """Take one token; whether it was legal."""
        with uncut:
            return bool(self._own.consume_token(token_id))

    def consume_tokens(self, token_ids: Sequence[int]) -> bool:
        """Take several tokens; whether all were legal."""
        with uncut:
            return bool(self._own.consume_tokens(list(token_ids)))

    def validate_tokens(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens could be taken; none is."""
        with uncut:
            return int(self._own.validate_tokens(list(token_ids)))

    def compute_ff_tokens(self) -> list[int]:
        """Tokens that must come next."""
        with uncut:
            return list(self._own.compute_ff_tokens())

    def compute_bitmask(self) -> bytes:
        """The legal tokens, a bit each."""
        with uncut:
            return bytes(self._own.compute_bitmask())
