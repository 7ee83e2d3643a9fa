"""KV of sequences in a llama.cpp context: a number each, over cells that forks share.

running   number, cells in the context
parked    the same, until the room is needed or the sequence is idle; then its KV is moved to host memory, and copied
          back when it is forked

Attention of a decode visits every cell up to the last one in use, those of other sequences too (masked): idle
sequences left in the context slow down all others. Hence they are moved out.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base import SequenceCache
from .context import Context, NoRoom

LOOK = 8
"""Decodes between looks at what is idle."""

IDLE = 16
"""Decodes without it after which a parked sequence is idle. Moving 1,024 tokens takes as long as two decodes: sooner,
and whatever runs, was measured slower with answers of a dozen tokens."""

FEW_CELLS = 512
"""Cells of idle sequences that are left where they are."""


class LastUse:
    """Number of the last decode over a sequence's cells; shared with its forks that share most of them."""

    decode = 0


class SequenceSlots:
    """The sequence numbers of a context, and the caches that can be moved out. Used under the lock.

    Args:
        context: whose sequences these are.
        lock: held by every user of the context.
        spare: numbers that caches leave to candidates.

    Attributes:
        token_bytes: of the KV of one token.
    """

    def __init__(self, context: Context, lock: Any, spare: int) -> None:
        self.context, self.lock = context, lock
        self._free = list(range(context.sequences))
        self._spare = spare
        self._abandoned: deque[int] = deque()
        self._parked: dict[int, weakref.ref[LlamaCppCache]] = {}
        self._decodes = 0
        self.token_bytes = context.token_bytes(self._free[0])

    def new_cache(self) -> LlamaCppCache:
        """An empty one."""
        return LlamaCppCache(self)

    def take(self, *, spare: bool = False) -> int:
        """The number of an empty sequence.

        Args:
            spare: one of those that caches leave may be taken.

        Raises:
            NoRoom: all are in use.
        """
        self.reclaim()
        while len(self._free) <= (0 if spare else self._spare):
            if not self.make_room():
                raise NoRoom(f"all {self.context.sequences} sequences are in use")
        return self._free.pop()

    @property
    def free(self) -> int:
        """Numbers that candidates can have."""
        return len(self._free)

    def give_back(self, number: int) -> None:
        """Forget a sequence."""
        self.context.cut(number, 0)
        self._free.append(number)

    def abandon(self, number: int) -> None:
        """Give it back at the next occasion, at once where the context is not in use. From any thread."""
        self._abandoned.append(number)
        if self.lock.acquire(blocking=False):
            try:
                self.reclaim()
            finally:
                self.lock.release()

    def reclaim(self) -> None:
        """Give back what was abandoned."""
        while self._abandoned:
            self.give_back(self._abandoned.popleft())

    def park(self, cache: LlamaCppCache) -> None:
        """This cache may have to make room from now on; the ones parked first do so first. Needs no lock."""
        self.unpark(cache)
        self._parked[id(cache)] = weakref.ref(cache)

    def unpark(self, cache: LlamaCppCache) -> None:
        """This cache makes no room any more. Needs no lock."""
        self._parked.pop(id(cache), None)

    def move_idle(self, running: Sequence[LlamaCppCache]) -> None:
        """Before a decode of these caches: move idle sequences to host memory if they have more cells than those.

        If only one sequence runs, everything parked is moved, and the running one to the first cells.
        """
        self._decodes += 1
        for cache in running:
            cache.last_use.decode = self._decodes
        if self._decodes % LOOK or not self.context.rolls_back:
            return
        self.reclaim()
        parked = [kept for ref in list(self._parked.values()) if (kept := ref()) is not None and kept.placed]
        idle = [cache for cache in parked if self._decodes - cache.last_use.decode > IDLE]
        if sum(cache.length for cache in idle) <= FEW_CELLS + sum(cache.length for cache in running):
            return
        alone = len(running) == 1 and self.context.sequences - len(self._free) == len(parked) + 1
        for cache in parked if alone else idle:
            cache.leave()
        if alone:
            running[0].leave()

    def make_room(self) -> bool:
        """Move the cells of one parked cache to host memory; False where none is parked."""
        if self._abandoned:
            self.reclaim()
            return True
        while self._parked:
            found = self._parked.pop(next(iter(self._parked)), None)
            cache = found() if found is not None else None
            if cache is not None and cache.leave():
                return True
        return False


class LlamaCppCache(SequenceCache):
    """The KV of one sequence; see ``base.SequenceCache``.

    Args:
        pool: where it lies. It takes a number when the first token is read.
    """

    length = read = 0

    def __init__(self, pool: SequenceSlots) -> None:
        self._pool = pool
        self._number: int | None = None
        self._saved: NDArray[np.uint8] | None = None
        self.last_use = LastUse()

    @property
    def placed(self) -> bool:
        """Whether it lies in the context."""
        return self._number is not None

    @property
    def number(self) -> int:
        """Of its sequence, in the context.

        Raises:
            NoRoom: there is none for it.
        """
        if self._number is None:
            self._number = self._placed()
            self._saved = None
        return self._number

    def _placed(self) -> int:
        """A number of the pool with these tokens, which lie in host memory or are none."""
        number = self._pool.take()
        if self._saved is not None:
            try:
                while not self._pool.context.restore(number, self._saved):
                    if not self._pool.make_room():
                        raise NoRoom(f"no room for {self.length:,} tokens among {self._pool.context.cells:,}")
            except BaseException:
                self._pool.give_back(number)
                raise
        return number

    @property
    def nbytes(self) -> int:
        """Bytes of its cells, shared or not."""
        return self.length * self._pool.token_bytes

    def fork(self, length: int) -> LlamaCppCache:
        """Another cache over the same cells: nothing is copied, but from host memory.

        Raises:
            NoRoom: there is no number, or no room for what lies in host memory.
        """
        with self._pool.lock:
            other = self._pool.new_cache()
            if not length or length > self.length:  # closed, then
                return other
            if self._number is None:
                other._number = self._placed()
                self._pool.context.cut(other._number, length)
            else:
                other._number = self._pool.take()
                if self._number is None:  # taking one has moved these very tokens
                    self._pool.give_back(other._number)
                    other._number = None
                    return self.fork(length)
                self._pool.context.share(self._number, other._number, length)
            other.length = other.read = length
            if 2 * length > self.length:
                other.last_use = self.last_use
            return other

    def leave(self) -> bool:
        """Move to host memory; False where nothing lies in the context."""
        if self._number is None:
            return False
        self._saved = self._pool.context.saved(self._number)
        self._pool.give_back(self._number)
        self._number = None
        return True

    def truncate(self, length: int) -> None:
        """Forget what comes after the first ``length`` tokens; also undoes a forward that failed half-way."""
        with self._pool.lock:
            if self._number is not None:
                self._pool.context.cut(self._number, length)
            elif length < self.length:
                self._pool.context.cut(self.number, length)
            self.length = length
            self.read = min(self.read, length)

    def mark_read(self, length: int) -> None:
        """See ``base.SequenceCache``."""
        self.read = length

    def park(self) -> None:
        """Its generation has ended: it may have to make room."""
        self._pool.park(self)

    def unpark(self) -> None:
        """A generation goes on with it: it stays."""
        self._pool.unpark(self)

    def close(self) -> None:
        """Forget everything; twice is once. Waits for no forward: garbage collection may call it anywhere."""
        number, self._number, self._saved = self._number, None, None
        self.length = self.read = 0
        if number is not None:
            self._pool.abandon(number)

    def __del__(self) -> None:
        if self._number is not None:
            self._pool.abandon(self._number)
