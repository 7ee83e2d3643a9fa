"""KV caches of earlier turns: an agent sends its whole conversation again, and only what is new has to be read.

    turn 1   system tools question answer                     inserted when the generation ends
    turn 2   system tools question answer' result | read      the longest common prefix is forked, the rest read

One cache for all generations over a model, bounded in bytes; the least recently used entry is evicted first. An entry
never changes once it is inserted: ``match`` gives a fork, which costs far less than reading the tokens again.

Garbage collection may end an abandoned generation at any allocation, inside these blocks too, and insert it then. So
the lock is reentrant, the list of entries is replaced in one go (at worst what was inserted in between is lost), and an
evicted cache is not closed but dropped: a match may be forking it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..backends.base import SequenceCache
from ..fork_safety import hold_while_forking

LIMIT_BYTES = 512 * 2**20
"""Memory for the KV caches of past turns, per model."""

Ids = Sequence[int] | NDArray[np.int64]
"""Of a prompt's tokens, ``[n]``."""

SHORTEST = 8
"""Tokens from which a common prefix is worth a fork."""


@dataclass(frozen=True, eq=False)
class CachedPrefix:
    """One entry: its scope, its tokens ``[n]`` and their KV cache."""

    scope: str | None
    ids: NDArray[np.int64]
    cache: SequenceCache


class PrefixCache:
    """KV caches found again by the longest common prefix of token ids. Safe under threads.

    Args:
        limit_bytes: never passed; 0 caches nothing.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self._entries: list[CachedPrefix] = []  # least recently used first
        self._lock = threading.RLock()
        hold_while_forking(self, "_lock")

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def entries(self) -> tuple[CachedPrefix, ...]:
        """What is cached, the least recently used first."""
        return tuple(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        with self._lock:
            return _bytes(self._entries)

    def match(self, ids: Ids, scope: str | None = None) -> tuple[SequenceCache | None, int]:
        """A fork of the longest common prefix, of all tokens but the last at most.

        Args:
            ids: the new prompt. Its last token is always read anew: its logits are wanted.
            scope: whose entries may match; no other scope's are looked at.

        Returns:
            The fork and its tokens; None and 0 where nothing fits.
        """
        with self._lock:
            entries = self._entries
            found, length = _longest(entries, ids, scope)
            if found is None:
                return None, 0
            self._entries = [*(entry for entry in entries if entry is not found), found]
        return found.cache.fork(length), length

    def longest(self, ids: Ids, scope: str | None = None) -> int:
        """How many tokens ``match`` would find."""
        with self._lock:
            return _longest(self._entries, ids, scope)[1]

    def insert(self, ids: Sequence[int], cache: SequenceCache, scope: str | None = None) -> None:
        """Take over the KV cache of ``ids``, which nothing else may write to any more.

        Entries that are the beginning of this one go; so do, if room is needed, the least recently used.
        """
        try:
            cache.park()
        except torch.OutOfMemoryError:  # the answer is there, and its KV goes with it
            return
        entry = CachedPrefix(scope, np.asarray(ids, dtype=np.int64), cache)
        size = cache.nbytes
        if len(ids) < SHORTEST or size > self.limit_bytes:
            return
        with self._lock:
            entries = self._entries
            shared = [(each, common_prefix(each.ids, entry.ids)) for each in entries if each.scope == scope]
            if any(length == len(entry.ids) for _, length in shared):
                return
            covered = [each for each, length in shared if length == len(each.ids)]
            staying = [each for each in entries if each not in covered]
            while staying and _bytes(staying) + size > self.limit_bytes:
                staying.pop(0)
            self._entries = [*staying, entry]

    def clear(self) -> None:
        """Evict everything."""
        with self._lock:
            self._entries = []


def common_prefix(one: Ids, other: Ids) -> int:
    """How many leading tokens two sequences share."""
    n = min(len(one), len(other))
    differing = np.flatnonzero(np.asarray(one[:n], dtype=np.int64) != np.asarray(other[:n], dtype=np.int64))
    return int(differing[0]) if len(differing) else n


def _longest(entries: Sequence[CachedPrefix], ids: Ids, scope: str | None) -> tuple[CachedPrefix | None, int]:
    wanted = np.asarray(ids[:-1], dtype=np.int64)
    mine = [(common_prefix(entry.ids, wanted), entry) for entry in entries if entry.scope == scope]
    length, found = max(mine, key=lambda each: each[0], default=(0, None))
    return (found, length) if length >= SHORTEST else (None, 0)


def _bytes(entries: Sequence[CachedPrefix]) -> int:
    return sum(entry.cache.nbytes for entry in entries)
