"""KV at addresses that stay: a sequence sits in one row of an arena (``arena``) while single tokens are added to it.

    seat    kv [2, layers, 1, heads, C, d]      a row of an arena, or a block of the sequence's own
    layer   keys, values [1, heads, C, d]       views of it

A captured graph reads and writes the same memory every time, so the buffers of a layer become views of the row. All
else (prompts, packed rows, overlays, cuts) uses them as it uses any growing buffers; what outgrows the seat leaves it.
All layers move from seat to seat in one copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..kv_cache import GrowingLayer, KVCache
from ..logit_statistics import Glance, glances

if TYPE_CHECKING:
    from .kv_pool import Arena


SURE = 3
"""Tokens in a row that were the model's own choice, after which its next choice is read before anybody asks."""

ROOM = 512
"""Tokens that a copy of a sequence has room for behind its end."""


@dataclass(eq=False)
class Seat:
    """Where all layers of one sequence lie together.

    Attributes:
        kv: ``[2, layers, 1, heads, C, d]``: keys and values.
        arena: whose row it is; None for a block of the sequence's own.
        row: its index.
        outgrown: some layer has moved to buffers of its own; the sequence has to be seated anew.
    """

    kv: Tensor
    arena: Arena | None = None
    row: int = 0
    outgrown: bool = False


class Play:
    """A step of some rows that the device works at.

    Args:
        logits: ``[n, V]``, fp32.
        hidden: ``[n, H]``.
        seen: ``[n, 3]``, see ``glance``; on its way to the host at once.
        start: what ``mark`` gave just before; None where there is no device beside the host.
        sequences: how many have a part in it.

    Attributes:
        alone_s: seconds from its beginning in which nobody waited for the device.
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
    def glances(self) -> list[Glance]:
        """Of each row; waits for this step, and not for what was begun after it."""
        if self._end is not None:
            self._end.synchronize()
        return glances(self._host)

    @property
    def device_s(self) -> float:
        """Seconds that the device was at it, once it has arrived; 0 where that is the host's own time."""
        if self._start is None or self._end is None:
            return 0.0
        return float(self._start.elapsed_time(self._end)) / 1000

    @property
    def unseen_s(self) -> float:
        """Each sequence's share of the seconds that the device was at it while nobody waited, once it has arrived."""
        return min(self.device_s, self.alone_s) / self._sequences


def mark(like: Tensor) -> torch.cuda.Event | None:
    """A point in a tensor's device's work, on CUDA."""
    if not like.is_cuda:
        return None
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(like.device))  # where another device is the current one, too
    return event


@dataclass(eq=False)
class Begun:
    """One sequence's part of a play.

    Attributes:
        play: the step.
        row: of the play.
        position: where its token stands.
        token: which it is; None until that is known.
    """

    play: Play
    row: int
    position: int
    token: int | None = None

    @property
    def outcome(self) -> tuple[Tensor, Tensor]:
        """Logits ``[V]`` and last hidden state ``[H]``, on the device, maybe still to come."""
        return self.play.logits[self.row], self.play.hidden[self.row]


class StaticLayer(GrowingLayer):
    """One layer of a sequence that may sit in an arena. Views are made when asked for: a step sets an integer."""

    length = 0
    seat: Seat | None = None

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
        self.length, self.seat = 0, None

    @property
    def front(self) -> tuple[Tensor, Tensor]:
        """Keys and values, as views."""
        return self.keys, self.values

    def lie(self, keys: Tensor, values: Tensor, seat: Seat) -> None:
        """From now on these are the buffers, ``[1, heads, C, d]``; the tokens are there already."""
        self._key_buffer, self._value_buffer, self.seat = keys, values, seat
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def _set_length(self, length: int) -> None:
        self.length = length

    def _grow(self, needed: int) -> None:
        if self.seat is not None and not self.seat.outgrown:
            self.seat.outgrown = True
            self.seat.kv = _block(self.seat.kv, 0)  # what is left behind goes with the last layer
        super()._grow(needed)


class StaticCache(KVCache):
    """The KV of one sequence, which can take a seat in an arena."""

    layer_class = StaticLayer
    front_stays = False  # a row that is left is another's at once
    seat: Seat | None = None
    begun: Begun | None = None
    """The step of the token that the model wants next, where it is under way."""
    hits = SURE
    """Tokens in a row that were those that the model wanted; at first it is trusted to be followed."""
    lone = 0
    """Steps in a row that nobody else took part in."""
    unseen_s = 0.0
    """What ``unseen`` says next."""
    _seen: tuple[int, Glance] | None = None

    @property
    def arena(self) -> Arena | None:
        """Where it sits with all its layers; None where it has to be seated, for the first time or anew."""
        return self.seat.arena if self.seat is not None and not self.seat.outgrown else None

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.seat, self.layers = None, []

    @torch.inference_mode()
    def clone(self, length: int) -> KVCache:
        """See ``KVCache``; in one copy where all layers lie together, with room for an agent's next turn."""
        if self.seat is None or self.seat.outgrown:
            return super().clone(length)
        other = StaticCache([StaticLayer() for _ in self.layers])
        kv = _block(self.seat.kv, length + ROOM)
        kv[..., :length, :] = self.seat.kv[..., :length, :]
        other._lie_in(Seat(kv))
        for layer in other.layers:
            layer.length = length
        other.read = length
        return other

    def forget_ahead(self) -> None:
        """See ``KVCache``."""
        super().forget_ahead()
        self.begun = self._seen = None

    def unseen(self) -> float:
        """See ``KVCache``."""
        seconds, self.unseen_s = self.unseen_s, 0.0
        return seconds

    def glance(self, length: int) -> Glance | None:
        """See ``KVCache``."""
        return self._seen[1] if self._seen is not None and self._seen[0] == length else None

    def start(self, kv: Tensor) -> None:
        """Sit down without a token, ``[2, layers, 1, heads, 0, d]``."""
        self.layers = [StaticLayer() for _ in kv[0]]
        self._lie_in(Seat(kv))

    def sit(self, seat: Seat) -> None:
        """Move to a seat that has room for all tokens."""
        self.begun = None  # it writes where the sequence has sat
        lengths = {layer.length for layer in self.layers}
        if self.seat is not None and not self.seat.outgrown and len(lengths) == 1:
            (length,) = lengths
            seat.kv[..., :length, :] = self.seat.kv[..., :length, :]
        else:
            for index, layer in enumerate(self.layers):
                for buffer, tokens in zip(seat.kv[:, index], layer.front, strict=True):
                    buffer[..., : layer.length, :] = tokens
        self._lie_in(seat)

    def _lie_in(self, seat: Seat) -> None:
        keys, values = (half.unbind(0) for half in seat.kv)
        for layer, *buffers in zip(self.layers, keys, values, strict=True):
            layer.lie(*buffers, seat)
        self.seat = seat  # last: from here on a row that was left is anybody's

    def follow(self, token: int, length: int) -> Begun | None:
        """This token comes next, after so many: its step, if it is under way."""
        before, begun = self.glance(length), self.begun
        if before is not None:
            self.hits = self.hits + 1 if before.best == token else 0
        self.begun = None
        return begun if begun is not None and (begun.token, begun.position) == (token, length) else None

    def advance(self, length: int, glance: Glance) -> None:
        """So many tokens are in the row now, and this is what the last one says."""
        for layer in self.layers:
            layer.length = length
        self._seen = length, glance

    @torch.inference_mode()
    def rest(self) -> None:
        """Leave the seat for buffers of the sequence's own, no larger than it."""
        super().rest()
        self.begun = None
        if self.seat is not None:
            self.sit(Seat(_block(self.seat.kv, max(layer.length for layer in self.layers))))


def _block(like: Tensor, capacity: int) -> Tensor:
    """An unwritten ``[2, layers, 1, heads, C, d]``."""
    return like.new_empty(*like.shape[:-2], capacity, like.shape[-1])


def _only_none(value: Any) -> None:
    if value is not None:
        raise AttributeError("the keys and values of a StaticLayer are views of its buffers and cannot be set.")
