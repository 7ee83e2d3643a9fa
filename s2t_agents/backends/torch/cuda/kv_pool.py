"""KV pools: KV at addresses that stay, for the sequences whose steps are captured graphs.

    KV pool of capacity C   row 0   | tokens of a | zeros                | spare |
                            row 1   | tokens of b                | zeros | spare |
                            row 2   | free                               | spare |

    slot of a               kv [2, layers, 1, heads, C, d]      row 0, or a block of the sequence's own
    layer of a              keys, values [1, heads, C, d]       views of it

A captured graph reads and writes the same memory every time, so the buffers of a sequence's layers become views of a
row while single tokens are added to it. All else (prompts, packed rows, overlays, cuts) uses them as it uses any
growing buffers; what outgrows the slot leaves it. All layers move from slot to slot in one copy.

One KV pool per bucket of capacities. It starts with one row and is replaced by one of twice the rows when it is full;
the sequences move over at their next step. The last column is spare: rows that sit out a step write there.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ...statistics import LogitStatistics
from ..kv_cache import GrowingLayer, KVCache
from .in_flight import InFlightRow

SMALLEST = 512
"""Tokens of the smallest bucket; all are multiples of it."""

LIMIT_BYTES = 4 * 2**30
"""Memory for all KV pools of one model; a sequence without a slot takes the eager path."""

SURE = 3
"""Tokens in a row that were the model's own choice, after which its next choice is read ahead."""

ROOM = 512
"""Tokens that a copy of a sequence has room for behind its end."""


def bucket(tokens: int) -> int:
    """Capacity for so many tokens and the spare column: 512, 1024, 1536, 2048, 3072, 4096, 6144, ..."""
    needed, size = tokens + 1, SMALLEST
    while size < needed:
        if size >= 2 * SMALLEST and size * 3 // 2 >= needed:
            return size * 3 // 2
        size *= 2
    return size


@dataclass(eq=False)
class Slot:
    """Where all layers of one sequence lie together.

    Attributes:
        kv: ``[2, layers, 1, heads, C, d]``: keys and values.
        pool: whose row it is; None for a block of the sequence's own.
        row: its index.
        outgrown: some layer has moved to buffers of its own; the sequence has to be allocated anew.
    """

    kv: Tensor
    pool: KVPool | None = None
    row: int = 0
    outgrown: bool = False


class PooledLayer(GrowingLayer):
    """One layer of a sequence that may lie in a KV pool. Views are made when asked for: a step sets an integer."""

    length = 0
    slot: Slot | None = None

    @property
    def keys(self) -> Any:
        """``[1, heads, length, d]``; None before the first token."""
        return self._key_buffer[..., : self.length, :] if self.is_initialized else None

    @keys.setter
    def keys(self, value: Any) -> None:
        _only_none(value)

    @property
    def values(self) -> Any:
        """As ``keys``."""
        return self._value_buffer[..., : self.length, :] if self.is_initialized else None

    @values.setter
    def values(self, value: Any) -> None:
        _only_none(value)

    def get_seq_length(self) -> int:
        """Tokens in it."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens."""
        if tokens_to_remove >= 0:
            DynamicLayer.crop(self, tokens_to_remove)  # nothing for 0, its own error above
        else:
            self.length = max(0, self.length + tokens_to_remove)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.length, self.slot = 0, None

    @property
    def front(self) -> tuple[Tensor, Tensor]:
        """Keys and values, as views."""
        return self.keys, self.values

    def use(self, keys: Tensor, values: Tensor, slot: Slot) -> None:
        """From now on these are the buffers, ``[1, heads, C, d]``; the tokens are there already."""
        self._key_buffer, self._value_buffer, self.slot = keys, values, slot
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def _end_with(self, keys: Tensor, values: Tensor) -> None:
        self.length = keys.shape[-2]

    def _set_length(self, length: int) -> None:
        self.length = length

    def _grow(self, needed: int) -> None:
        if self.slot is not None and not self.slot.outgrown:
            self.slot.outgrown = True
            self.slot.kv = _block(self.slot.kv, 0)  # what is left behind goes with the last layer
        super()._grow(needed)


class PooledKVCache(KVCache):
    """The KV of one sequence, which can take a slot in a KV pool."""

    layer_class = PooledLayer
    slot: Slot | None = None
    in_flight: InFlightRow | None = None
    """The step of the token that the model wants next, where it is under way."""
    hits = SURE
    """Tokens in a row that were those that the model wanted; at first it is trusted to be followed."""
    alone_steps = 0
    """Steps in a row that no other sequence took part in."""
    device_alone_s = 0.0
    """What ``unbilled_s`` returns next."""
    _seen: tuple[int, LogitStatistics] | None = None

    @property
    def pool(self) -> KVPool | None:
        """Where it lies with all its layers; None where it has to be allocated, for the first time or anew."""
        return self.slot.pool if self.slot is not None and not self.slot.outgrown else None

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.slot, self.layers = None, []

    @torch.inference_mode()
    def fork(self, length: int) -> KVCache:
        """See ``KVCache``; in one copy where all layers lie together, with room for an agent's next turn."""
        if self.slot is None or self.slot.outgrown:
            return super().fork(length)
        other = PooledKVCache([PooledLayer() for _ in self.layers])
        kv = _block(self.slot.kv, length + ROOM)
        kv[..., :length, :] = self.slot.kv[..., :length, :]
        other._use_slot(Slot(kv))
        for layer in other.layers:
            layer.length = length
        other.read = length
        return other

    def drop_prefetched(self) -> None:
        """See ``KVCache``."""
        super().drop_prefetched()
        self.in_flight = self._seen = None

    def unbilled_s(self) -> float:
        """See ``KVCache``."""
        seconds, self.device_alone_s = self.device_alone_s, 0.0
        return seconds

    def statistics(self) -> LogitStatistics | None:
        """See ``KVCache``."""
        return self._statistics_at(self.length)

    def _statistics_at(self, length: int) -> LogitStatistics | None:
        return self._seen[1] if self._seen is not None and self._seen[0] == length else None

    def start(self, kv: Tensor) -> None:
        """Begin without a token, ``[2, layers, 1, heads, 0, d]``."""
        self.layers = [PooledLayer() for _ in kv[0]]
        self._use_slot(Slot(kv))

    def occupy(self, slot: Slot) -> None:
        """Move to a slot that has room for all tokens."""
        self.in_flight = None  # it writes to the old slot
        lengths = {layer.length for layer in self.layers}
        if self.slot is not None and not self.slot.outgrown and len(lengths) == 1:
            (length,) = lengths
            slot.kv[..., :length, :] = self.slot.kv[..., :length, :]
        else:
            for index, layer in enumerate(self.layers):
                for buffer, tokens in zip(slot.kv[:, index], layer.front, strict=True):
                    buffer[..., : layer.length, :] = tokens
        self._use_slot(slot)

    def _use_slot(self, slot: Slot) -> None:
        keys, values = (half.unbind(0) for half in slot.kv)
        for layer, *buffers in zip(self.layers, keys, values, strict=True):
            layer.use(*buffers, slot)
        self.slot = slot  # last: from here on the row that was left is free

    def follow(self, token: int, length: int) -> InFlightRow | None:
        """This token comes next, after so many: its step, if it is under way."""
        before, in_flight = self._statistics_at(length), self.in_flight
        if before is not None:
            self.hits = self.hits + 1 if before.best == token else 0
        self.in_flight = None
        return in_flight if in_flight is not None and (in_flight.token, in_flight.position) == (token, length) else None

    def advance(self, length: int, statistics: LogitStatistics) -> None:
        """So many tokens are in the row now; the statistics are those after the last one."""
        for layer in self.layers:
            layer.length = length
        self._seen = length, statistics

    @torch.inference_mode()
    def park(self) -> None:
        """Leave the slot for buffers of the sequence's own, no larger than it."""
        super().park()
        self.in_flight = None
        if self.slot is not None:
            self.occupy(Slot(_block(self.slot.kv, max(layer.length for layer in self.layers))))


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


def _block(like: Tensor, capacity: int) -> Tensor:
    """An unwritten ``[2, layers, 1, heads, C, d]``."""
    return like.new_empty(*like.shape[:-2], capacity, like.shape[-1])


def _only_none(value: Any) -> None:
    if value is not None:
        raise AttributeError("the keys and values of a PooledLayer are views of its buffers and cannot be set.")
