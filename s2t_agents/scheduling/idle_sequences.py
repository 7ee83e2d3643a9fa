"""Sequences of a second model whose generations have ended: the next turn of the same conversation continues one."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from math import inf

from ..fork_safety import hold_while_forking
from .sequence import TokenSequence


class IdleSequences:
    """A few sequences, found again by their common prefix. Safe under threads.

    Args:
        limit: how many are kept, at least 1; the oldest goes.
        limit_bytes: of all their KV; the newest is kept in any case.
    """

    def __init__(self, limit: int, limit_bytes: float = inf) -> None:
        self._limit, self._limit_bytes = limit, limit_bytes
        self._sequences: list[TokenSequence] = []  # replaced, never changed: see PrefixCache
        self._lock = threading.RLock()
        hold_while_forking(self, "_lock")

    def __len__(self) -> int:
        return len(self._sequences)

    def take(self, ids: Sequence[int], scope: str | None, *, sharing: int = 0) -> TokenSequence | None:
        """The sequence that shares most with ``ids``, now the caller's own; None where there is none.

        Args:
            ids: what it will be moved to.
            scope: whose sequences may be taken; no other scope's are looked at, so that not even timing tells of them.
            sharing: tokens that it must share at least.
        """
        with self._lock:
            mine = [each for each in self._sequences if each.scope == scope]
            best = max(mine, key=lambda each: each.common_prefix(ids), default=None)
            if best is None or best.common_prefix(ids) < sharing:
                return None
            self._sequences = [each for each in self._sequences if each is not best]
            return best

    def put(self, sequence: TokenSequence) -> None:
        """Take a sequence over; nothing else uses it any more."""
        with self._lock:
            kept = [*self._sequences, sequence]
            sizes = [each.cache.nbytes for each in kept]
            first = max(0, len(kept) - self._limit)
            while first + 1 < len(kept) and sum(sizes[first:]) > self._limit_bytes:
                first += 1
            self._sequences, dropped = kept[first:], kept[:first]
        for each in dropped:
            each.close()
