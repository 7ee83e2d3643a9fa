"""KV caches of earlier turns: an agent sends its whole conversation again, and only what is new has to be read.
Within a limit of bytes; the least recently used entry is evicted first, whoever's it is.

    turn 1   system tools question answer                     inserted when the generation ends
    turn 2   system tools question answer | result            the whole entry is taken, the rest read
    other    system tools | another question                  the longest common prefix is forked, the rest read

One cache for all generations over a model. An entry never changes while it is one. A fork costs far less than reading
the tokens again, and an entry that a prompt goes on from is not even copied: ``take`` hands it over, and it comes back
longer.

Each scope's entries are sorted by their tokens, and none is the beginning of another. The one that shares most with a
prompt stands beside the place where the prompt would: a search takes a few comparisons, however many entries there are.

Garbage collection may end an abandoned generation at any allocation, inside these blocks too, and insert it then. So
the lock is reentrant, what comes in the middle of a block is not kept, and an evicted cache is not closed but dropped:
a match may be forking it.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter

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
    """One entry: its scope, its tokens ``[n]``, their KV cache and its bytes."""

    scope: str | None
    ids: NDArray[np.int64]
    cache: SequenceCache
    nbytes: int

    @cached_property
    def key(self) -> bytes:
        """What it is sorted by."""
        return _key(self.ids)


class PrefixCache:
    """KV caches found again by the longest common prefix of token ids. Safe under threads.

    Args:
        limit_bytes: never passed; 0 caches nothing.

    Attributes:
        nbytes: of all entries.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self.limit_bytes, self.nbytes = limit_bytes, 0
        self._entries: dict[CachedPrefix, None] = {}  # least recently used first
        self._sorted: dict[str | None, list[CachedPrefix]] = {}  # by scope
        self._in_use = False
        self._lock = threading.RLock()
        hold_while_forking(self, "_lock")

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def entries(self) -> tuple[CachedPrefix, ...]:
        """What is cached, the least recently used first."""
        return tuple(self._entries)

    def match(self, ids: Ids, scope: str | None = None) -> tuple[SequenceCache | None, int]:
        """A fork of the longest common prefix, of all tokens but the last at most.

        Args:
            ids: the new prompt. Its last token is always read anew: its logits are wanted.
            scope: whose entries may match; no other scope's are looked at.

        Returns:
            The fork and its tokens; None and 0 where nothing fits.
        """
        with self._exclusive():
            found, length = self._longest(ids, scope)
            if found is None:
                return None, 0
            self._entries[found] = self._entries.pop(found)
        return _forked(found.cache, length)

    def take(self, ids: Ids, scope: str | None = None) -> tuple[SequenceCache | None, int]:
        """``match``, for a generation that inserts the cache at its end: a whole entry is not forked but handed over.

        An entry that the prompt lets grow beyond half the limit is forked: it might not be accepted again.
        """
        with self._exclusive():
            found, length = self._longest(ids, scope)
            if (
                found is not None
                and length == len(found.ids)
                and 2 * found.nbytes * len(ids) <= self.limit_bytes * length
            ):
                self._evict(found)
                found.cache.unpark()
                return found.cache, length
        return self.match(ids, scope)

    def longest(self, ids: Ids, scope: str | None = None) -> int:
        """How many tokens ``match`` would find."""
        with self._exclusive():
            return self._longest(ids, scope)[1]

    def insert(self, ids: Sequence[int], cache: SequenceCache, scope: str | None = None) -> None:
        """Take over the KV cache of ``ids``, which nothing else may write to any more.

        An entry that is the beginning of this one goes; so do, if room is needed, the least recently used.
        """
        try:
            cache.park()
        except torch.OutOfMemoryError:  # the answer is there, and its KV goes with it
            return
        entry = CachedPrefix(scope, np.asarray(ids, dtype=np.int64), cache, cache.nbytes)
        if len(ids) < SHORTEST or entry.nbytes > self.limit_bytes:
            return
        with self._exclusive() as outermost:
            if not outermost:
                return
            before, after = self._beside(entry.key, scope)
            if after is not None and after.key.startswith(entry.key):
                return
            if before is not None and entry.key.startswith(before.key):
                self._evict(before)
            while self.nbytes + entry.nbytes > self.limit_bytes:
                self._evict(next(iter(self._entries)))
            beside = self._sorted.setdefault(scope, [])
            beside.insert(bisect_left(beside, entry.key, key=_key_of), entry)
            self._entries[entry] = None
            self.nbytes += entry.nbytes

    def clear(self) -> None:
        """Evict everything."""
        with self._exclusive():
            self._entries, self._sorted, self.nbytes = {}, {}, 0

    @contextmanager
    def _exclusive(self) -> Iterator[bool]:
        """Nobody else is in such a block; False inside another one of the same thread."""
        with self._lock:
            outermost, self._in_use = not self._in_use, True
            try:
                yield outermost
            finally:
                self._in_use = not outermost

    def _beside(self, key: bytes, scope: str | None) -> tuple[CachedPrefix | None, CachedPrefix | None]:
        """The entries before and after the place where a key stands; one that is equal comes after."""
        entries = self._sorted.get(scope, ())
        at = bisect_left(entries, key, key=_key_of)
        return (entries[at - 1] if at else None), (entries[at] if at < len(entries) else None)

    def _longest(self, ids: Ids, scope: str | None) -> tuple[CachedPrefix | None, int]:
        wanted = np.asarray(ids[:-1], dtype=np.int64)
        beside = [each for each in self._beside(_key(wanted), scope) if each is not None]
        shared = [(common_prefix(each.ids, wanted), each) for each in beside]
        length, found = max(shared, key=lambda each: each[0], default=(0, None))
        return (found, length) if length >= SHORTEST else (None, 0)

    def _evict(self, entry: CachedPrefix) -> None:
        del self._entries[entry]
        self.nbytes -= entry.nbytes
        beside = self._sorted[entry.scope]
        del beside[bisect_left(beside, entry.key, key=_key_of)]
        if not beside:
            del self._sorted[entry.scope]


def _key(ids: NDArray[np.int64]) -> bytes:
    """Bytes in the order of the tokens; those of a beginning are a beginning."""
    return ids.astype(">i8").tobytes()


_key_of = attrgetter("key")


def _forked(cache: SequenceCache, length: int) -> tuple[SequenceCache | None, int]:
    """A fork with so many tokens; None and 0 where the generation that took the cache has failed and closed it."""
    fork = cache.fork(length)
    return (fork, length) if fork.read == length else (None, 0)


def common_prefix(one: Ids, other: Ids) -> int:
    """How many leading tokens two sequences share."""
    n = min(len(one), len(other))
    differing = np.flatnonzero(np.asarray(one[:n], dtype=np.int64) != np.asarray(other[:n], dtype=np.int64))
    return int(differing[0]) if len(differing) else n
