"""KV of earlier turns: an agent sends its whole conversation again, and only what is new has to be read.

    turn 1   system tools question answer                     kept when the generation ends
    turn 2   system tools question answer' result | read      the longest common prefix is copied, the rest read

Shared by all generations over one model, bounded in bytes, the longest unused goes first. An entry never changes once
it is kept: whoever takes from it gets a copy, which costs far less than reading the tokens again.

Garbage collection ends abandoned generations at any allocation, inside these blocks too, and they are kept then. So the
lock lets its own thread in again, and the list is replaced in one go: at worst what was kept in between is lost.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..backends.torch.kv_cache import KVCache
from ..fork_safety import hold_while_forking

LIMIT_BYTES = 512 * 2**20
"""Memory for the KV of past turns, per model."""

Ids = Sequence[int] | NDArray[np.int64]
"""Of a prompt's tokens, ``[n]``."""

WORTH = 8
"""Tokens from which a common prefix is worth a copy."""


@dataclass(frozen=True, eq=False)
class Entry:
    """One kept sequence: its scope, its tokens ``[n]`` and their KV."""

    scope: str | None
    ids: NDArray[np.int64]
    cache: KVCache


class PrefixCache:
    """Past KV, found again by the longest common prefix of token ids. Safe under threads.

    Args:
        limit_bytes: never passed; 0 keeps nothing.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self._entries: list[Entry] = []  # least lately used first
        self._lock = threading.RLock()
        hold_while_forking(self, "_lock")

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        with self._lock:
            return _bytes(self._entries)

    def take(self, ids: Ids, scope: str | None = None) -> tuple[KVCache | None, int]:
        """A copy of the KV of the longest common prefix, of all tokens but the last at most.

        Args:
            ids: the new prompt. Its last token is always read anew: its logits are wanted.
            scope: whose entries may be matched; no other scope's are looked at.

        Returns:
            The copy and its tokens; None and 0 where nothing fits.
        """
        with self._lock:
            entries = self._entries
            found, length = _longest(entries, ids, scope)
            if found is None:
                return None, 0
            self._entries = [*(entry for entry in entries if entry is not found), found]
        return found.cache.clone(length), length

    def longest(self, ids: Ids, scope: str | None = None) -> int:
        """How many tokens ``take`` would find."""
        with self._lock:
            return _longest(self._entries, ids, scope)[1]

    def keep(self, ids: Sequence[int], cache: KVCache, scope: str | None = None) -> None:
        """Take over the KV of ``ids``, which nobody else may write to any more.

        Entries that are the beginning of this one go; so do, if room is needed, those unused for longest.
        """
        try:
            cache.rest()
        except torch.OutOfMemoryError:  # the answer is there, and its KV goes with it
            return
        kept = Entry(scope, np.asarray(ids, dtype=np.int64), cache)
        size = cache.nbytes
        if len(ids) < WORTH or size > self.limit_bytes:
            return
        with self._lock:
            entries = self._entries
            rivals = [(entry, common(entry.ids, kept.ids)) for entry in entries if entry.scope == scope]
            if any(length == len(kept.ids) for _, length in rivals):
                return
            covered = [entry for entry, length in rivals if length == len(entry.ids)]
            staying = [entry for entry in entries if entry not in covered]
            while staying and _bytes(staying) + size > self.limit_bytes:
                staying.pop(0)
            self._entries = [*staying, kept]

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries = []


def _longest(entries: Sequence[Entry], ids: Ids, scope: str | None) -> tuple[Entry | None, int]:
    wanted = np.asarray(ids[:-1], dtype=np.int64)
    mine = [(common(entry.ids, wanted), entry) for entry in entries if entry.scope == scope]
    length, found = max(mine, key=lambda each: each[0], default=(0, None))
    return (found, length) if length >= WORTH else (None, 0)


def _bytes(entries: Sequence[Entry]) -> int:
    return sum(entry.cache.nbytes for entry in entries)


def common(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """How many leading tokens two sequences share."""
    n = min(len(one), len(other))
    differing = np.flatnonzero(one[:n] != other[:n])
    return int(differing[0]) if len(differing) else n
