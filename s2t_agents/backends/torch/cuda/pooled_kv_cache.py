"""KV at addresses that stay: a sequence lies in one row of a KV pool (``kv_pool``) while single tokens are added to it.

    slot    kv [2, layers, 1, heads, C, d]      a row of a KV pool, or a block of the sequence's own
    layer   keys, values [1, heads, C, d]       views of it

A captured graph reads and writes the same memory every time, so the buffers of a layer become views of the row. All
else (prompts, packed rows, overlays, cuts) uses them as it uses any growing buffers; what outgrows the slot leaves it.
All layers move from slot to slot in one copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ...statistics import LogitStatistics, statistics_of_rows
from ..kv_cache import GrowingLayer, KVCache

if TYPE_CHECKING:
    from .kv_pool import KVPool


SURE = 3
"""Tokens in a row that were the model's own choice, after which its next choice is read ahead."""

ROOM = 512
"""Tokens that a copy of a sequence has room for behind its end."""


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


class InFlightStep:
    """A step of some rows that the device works at.

    Args:
        logits: ``[n, V]``, fp32.
        hidden: ``[n, H]``.
        seen: ``[n, 3]``, see ``statistics``; on its way to the host at once.
        start: what ``mark`` gave just before; None where there is no device beside the host.
        sequences: how many have a part in it.

    Attributes:
        alone_s: seconds from its beginning in which no caller waited for the device.
    """

    def __init__(
        self, logits: Tensor, hidden: Tensor, seen: Tensor, start: torch.cuda.Event | None, sequences: int
    ) -> None:
        self.logits, self.hidden, self.seen, self._sequences = logits, hidden, seen, sequences
        self.alone_s = 0.0
        self._host = seen
        if start is not None:
            self._host = torch.empty(seen.shape, dtype=seen.dtype, pin_memory=True).copy_(seen, non_blocking=True)
        self._start, self._end = start, mark(seen)

    @cached_property
    def statistics_of_rows(self) -> list[LogitStatistics]:
        """Of each row; waits for this step, and not for what was begun after it."""
        if self._end is not None:
            self._end.synchronize()
        return statistics_of_rows(self._host)

    @property
    def device_s(self) -> float:
        """Seconds that the device was at it, once it has arrived; 0 where that is the host's own time."""
        if self._start is None or self._end is None:
            return 0.0
        return float(self._start.elapsed_time(self._end)) / 1000

    @property
    def device_alone_s(self) -> float:
        """Each sequence's share of the device's seconds while no caller waited, once the step is done."""
        return min(self.device_s, self.alone_s) / self._sequences


def mark(like: Tensor) -> torch.cuda.Event | None:
    """A point in a tensor's device's work, on CUDA."""
    if not like.is_cuda:
        return None
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(like.device))  # where another device is the current one, too
    return event


@dataclass(eq=False)
class InFlightRow:
    """One sequence's part of a play.

    Attributes:
        play: the step.
        row: of the play.
        position: where its token stands.
        token: which it is; None until that is known.
    """

    play: InFlightStep
    row: int
    position: int
    token: int | None = None

    @property
    def output(self) -> tuple[Tensor, Tensor]:
        """Logits ``[V]`` and last hidden state ``[H]``, on the device, maybe still to come."""
        return self.play.logits[self.row], self.play.hidden[self.row]


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

    def lie(self, keys: Tensor, values: Tensor, slot: Slot) -> None:
        """From now on these are the buffers, ``[1, heads, C, d]``; the tokens are there already."""
        self._key_buffer, self._value_buffer, self.slot = keys, values, slot
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

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
        other._lie_in(Slot(kv))
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
        self._lie_in(Slot(kv))

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
        self._lie_in(slot)

    def _lie_in(self, slot: Slot) -> None:
        keys, values = (half.unbind(0) for half in slot.kv)
        for layer, *buffers in zip(self.layers, keys, values, strict=True):
            layer.lie(*buffers, slot)
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


def _block(like: Tensor, capacity: int) -> Tensor:
    """An unwritten ``[2, layers, 1, heads, C, d]``."""
    return like.new_empty(*like.shape[:-2], capacity, like.shape[-1])


def _only_none(value: Any) -> None:
    if value is not None:
        raise AttributeError("the keys and values of a StaticLayer are views of its buffers and cannot be set.")
