"""KV that nobody uses just now: the next generation of the same conversation goes on with it."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from ..fork_safety import hold_while_forking
from .sequence import Prefix


class IdlePrefixes:
    """A few prefixes whose generations ended, found again by what they share. Safe under threads.

    Args:
        limit: how many are kept, at least 1; the oldest goes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._prefixes: list[Prefix] = []  # replaced, never changed: see PrefixCache
        self._lock = threading.RLock()
        hold_while_forking(self, "_lock")

    def __len__(self) -> int:
        return len(self._prefixes)

    def take(self, ids: Sequence[int], scope: str | None, *, sharing: int = 0) -> Prefix | None:
        """The prefix that shares most with ``ids``, now the caller's own; None where there is none.

        Args:
            ids: what it will be moved to.
            scope: whose prefixes may be taken; no other scope's are looked at, so that not even timing tells of them.
            sharing: tokens that it must share at least.
        """
        with self._lock:
            mine = [prefix for prefix in self._prefixes if prefix.scope == scope]
            best = max(mine, key=lambda prefix: prefix.shared(ids), default=None)
            if best is None or best.shared(ids) < sharing:
                return None
            self._prefixes = [prefix for prefix in self._prefixes if prefix is not best]
            return best

    def keep(self, prefix: Prefix) -> None:
        """Take a prefix over; nobody else uses it any more."""
        with self._lock:
            self._prefixes = [*self._prefixes, prefix][-self._limit :]
