"""KV pools: rows of fixed capacity that hold sequences while their steps are captured graphs.

    KV pool of capacity C   row 0   | tokens of a | zeros                | spare |
                            row 1   | tokens of b                | zeros | spare |
                            row 2   | free                               | spare |

One KV pool per bucket of capacities. It starts with one row and is replaced by one of twice the rows when it is full;
the sequences move over at their next step. The last column is spare: rows that sit out a step write there.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from ..kv_cache import GrowingLayer
from .pooled_kv_cache import PooledKVCache, Slot

SMALLEST = 512
"""Tokens of the smallest bucket; all are multiples of it."""

LIMIT_BYTES = 4 * 2**30
"""Memory for all KV pools of one model; a sequence without a slot takes the eager path."""


def bucket(tokens: int) -> int:
    """Capacity for so many tokens and the spare column: 512, 1024, 1536, 2048, 3072, 4096, 6144, ..."""
    needed, size = tokens + 1, SMALLEST
    while size < needed:
        if size >= 2 * SMALLEST and size * 3 // 2 >= needed:
            return size * 3 // 2
        size *= 2
    return size


class KVPool:
    """KV of several sequences, ``[2, layers, rows, heads, capacity, d]``: keys and values.

    Args:
        like: a layer whose sizes, dtype and device are taken.
        layers: how many there are.
        rows: sequences that fit, a power of two.
        capacity: tokens of each, the spare column included.
    """

    def __init__(self, like: GrowingLayer, layers: int, rows: int, capacity: int) -> None:
        buffer = like._key_buffer
        heads, d = buffer.shape[1], buffer.shape[-1]
        self.rows, self.capacity = rows, capacity
        self.kv = buffer.new_zeros(2, layers, rows, heads, capacity, d)
        self._occupants: list[weakref.ref[PooledKVCache] | None] = [None] * rows

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return int(self.kv.nbytes)

    @property
    def empty(self) -> bool:
        """Whether all rows are free."""
        return len(self.free()) == self.rows

    def holds(self, cache: PooledKVCache) -> bool:
        """Whether a sequence is here with all its layers."""
        return cache.pool is self

    def free(self) -> list[int]:
        """Rows that are free: their sequences have moved, are parked or gone."""
        return [row for row, guest in enumerate(self._occupants) if guest is None or not self._in(row, guest())]

    def occupants(self) -> list[PooledKVCache]:
        """The sequences in it."""
        occupants = [(row, guest() if guest is not None else None) for row, guest in enumerate(self._occupants)]
        return [guest for row, guest in occupants if guest is not None and self._in(row, guest)]

    def slot(self, cache: PooledKVCache) -> None:
        """Move a sequence to the first free row."""
        row = self.free()[0]
        self.kv[:, :, row].zero_()  # what is masked is multiplied by zero, which NaN would survive
        cache.occupy(Slot(self.kv[:, :, row : row + 1, :, : self.capacity - 1], self, row))
        self._occupants[row] = weakref.ref(cache)

    def _in(self, row: int, guest: PooledKVCache | None) -> bool:
        slot = guest.slot if guest is not None else None
        return slot is not None and slot.pool is self and slot.row == row


class KVPools:
    """All KV pools of one model. Not thread-safe: used under the model's lock.

    Args:
        limit_bytes: passed by all of them together only while sequences move from one to a larger one.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self._by_capacity: dict[int, KVPool] = {}
        self._alive: weakref.WeakSet[KVPool] = weakref.WeakSet()
        """Those, and replaced ones that still hold sequences."""

    @property
    def pools(self) -> list[KVPool]:
        """The KV pools that sequences are put into."""
        return list(self._by_capacity.values())

    def slot(self, caches: Sequence[PooledKVCache], lengths: Sequence[int]) -> list[KVPool | None]:
        """Allocate slots: all in one KV pool where there is memory for it, else by capacity, as many as possible.

        Args:
            caches: with at least one token each.
            lengths: tokens that each has to have room for.

        Returns:
            The KV pool of each; None where there is no memory.
        """
        wanted = [max(bucket(length), _capacity(cache)) for cache, length in zip(caches, lengths, strict=True)]
        if not self._all_in(max(wanted), caches):
            for capacity in sorted(set(wanted)):
                alike = [cache for cache, each in zip(caches, wanted, strict=True) if each == capacity]
                alike.sort(key=lambda cache: _capacity(cache) < capacity)  # first those that have a slot of that size
                while alike and not self._all_in(capacity, alike):
                    alike.pop()
        return [
            cache.pool if _capacity(cache) > length else None for cache, length in zip(caches, lengths, strict=True)
        ]

    def occupants(self) -> list[PooledKVCache]:
        """The sequences in all of them."""
        return [guest for pool in self._alive for guest in pool.occupants()]

    def _all_in(self, capacity: int, caches: Sequence[PooledKVCache]) -> bool:
        """Move sequences to the KV pool of a capacity; False, with nothing moved, where there is no memory for it."""
        pool = self._by_capacity.get(capacity)
        moving = [cache for cache in caches if pool is None or not pool.holds(cache)]
        if pool is None or len(moving) > len(pool.free()):
            pool, moving = self._larger(pool, capacity, caches), list(caches)
        if pool is None:
            return False
        for cache in moving:
            pool.slot(cache)
        return True

    def _larger(self, old: KVPool | None, capacity: int, caches: Sequence[PooledKVCache]) -> KVPool | None:
        """A new KV pool with rows for these and for all sequences of the old one, which it replaces."""
        staying = 0 if old is None else old.rows - len(old.free()) - sum(map(old.holds, caches))
        rows = 1 << (staying + len(caches) - 1).bit_length()
        like, layers = caches[0].layers[0], len(caches[0].layers)
        size = 2 * layers * rows * capacity * like._key_buffer.shape[1] * like._key_buffer.shape[-1]
        size *= like._key_buffer.element_size()
        if not self._fits(size, beside=[each for each in self._alive if staying or each is not old]):
            return None
        pool = self._by_capacity[capacity] = KVPool(like, layers, rows, capacity)
        self._alive.add(pool)
        return pool

    def _fits(self, size: int, beside: Sequence[KVPool]) -> bool:
        """Whether there is memory for a KV pool of this size beside others, maybe after the empty ones are gone."""
        if size + sum(pool.nbytes for pool in beside) <= self.limit_bytes:
            return True
        if size + sum(pool.nbytes for pool in beside if not pool.empty) > self.limit_bytes:
            return False
        self._by_capacity = {each: pool for each, pool in self._by_capacity.items() if not pool.empty}
        return True


def _capacity(cache: PooledKVCache) -> int:
    """Of the row in which a sequence lies; 0 where it has none."""
    return cache.pool.capacity if cache.pool is not None else 0
