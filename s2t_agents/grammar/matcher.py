"""llguidance's matcher; ``os.fork`` waits for its calls, which release the GIL and take locks that matchers share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer

from ..fork_safety import delay_fork

Mask = npt.NDArray[np.bool_]


class Matcher:
    """A grammar state, with the interface of ``llguidance.LLMatcher`` and its mask as an array.

    Args:
        core: llguidance's tokenizer.
        source: the grammar, in llguidance's Lark dialect.
    """

    def __init__(self, core: LLTokenizer, source: str) -> None:
        self._size: int = core.vocab_size
        with delay_fork:
            self._matcher = LLMatcher(core, source, log_level=0)

    def deep_copy(self) -> Matcher:
        """An independent copy of the state."""
        copied = Matcher.__new__(Matcher)
        copied._size = self._size
        with delay_fork:
            copied._matcher = self._matcher.deep_copy()
        return copied

    def is_error(self) -> bool:
        """Whether llguidance has failed, see ``get_error``."""
        return bool(self._matcher.is_error())

    def get_error(self) -> str:
        """llguidance's error message."""
        return str(self._matcher.get_error())

    def is_accepting(self) -> bool:
        """Whether the tokens so far are a complete text of the grammar."""
        with delay_fork:
            return bool(self._matcher.is_accepting())

    def is_stopped(self) -> bool:
        """Whether no token is legal any more."""
        return bool(self._matcher.is_stopped())

    def consume_token(self, token_id: int) -> bool:
        """Advance by one token; False if it is not legal."""
        with delay_fork:
            return bool(self._matcher.consume_token(token_id))

    def consume_tokens(self, token_ids: Sequence[int]) -> bool:
        """Advance by several tokens; False if one is not legal."""
        with delay_fork:
            return bool(self._matcher.consume_tokens(list(token_ids)))

    def validate_tokens(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens are legal in sequence; the state does not change."""
        with delay_fork:
            return int(self._matcher.validate_tokens(list(token_ids)))

    def compute_ff_tokens(self) -> list[int]:
        """Forced tokens ("fast-forward"): the only legal continuation, as far as there is one."""
        with delay_fork:
            return list(self._matcher.compute_ff_tokens())

    def compute_bitmask(self) -> bytes:
        """The token mask, one bit per token, little-endian."""
        with delay_fork:
            return bytes(self._matcher.compute_bitmask())

    def mask(self) -> Mask:
        """The token mask ``[V]`` (bool)."""
        bits = np.frombuffer(self.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(bits, count=self._size, bitorder="little").view(np.bool_)
