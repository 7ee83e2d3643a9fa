"""KV at addresses that stay: a sequence sits in one row of an arena (``arena``) while single tokens are added to it.

A captured graph reads and writes the same memory every time, so the buffers of a layer become views of the row. All
else (prompts, packed rows, overlays, cuts) uses them as it uses any growing buffers; what outgrows the row leaves it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .glance import Glance, glances
from .kv import GrowingLayer, KVCache

if TYPE_CHECKING:
    from .arena import Arena


@dataclass(eq=False)
class Seat:
    """One row of an arena, taken by one sequence.

    Attributes:
        arena: whose row it is.
        row: its index.
        outgrown: some layer has moved to buffers of its own; the sequence has to be seated anew.
    """

    arena: Arena
    row: int
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

    def move(self, keys: Tensor, values: Tensor, seat: Seat | None) -> None:
        """From now on these are the buffers, ``[1, heads, capacity, d]``; the tokens are copied there."""
        keys[..., : self.length, :] = self._key_buffer[..., : self.length, :]
        values[..., : self.length, :] = self._value_buffer[..., : self.length, :]
        self._key_buffer, self._value_buffer, self.seat = keys, values, seat

    def _set_length(self, length: int) -> None:
        self.length = length

    def _grow(self, needed: int) -> None:
        if self.seat is not None:
            self.seat.outgrown = True
        super()._grow(needed)


class StaticCache(KVCache):
    """The KV of one sequence, which can take a seat in an arena."""

    layer_class = StaticLayer
    front_stays = False  # a row that is left is another's at once
    seat: Seat | None = None
    begun: Begun | None = None
    """The step of the token that the model wants next, where it is under way."""
    hits = 0
    """Tokens in a row that were those that the model wanted."""
    unseen_s = 0.0
    """What ``unseen`` says next."""
    _seen: tuple[int, Glance] | None = None

    @property
    def arena(self) -> Arena | None:
        """Where it sits with all its layers; None where it has to be seated, for the first time or anew."""
        return self.seat.arena if self.seat is not None and not self.seat.outgrown else None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens, and what was read past the end."""
        self.begun = self._seen = None
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget everything."""
        self.begun = self._seen = None
        super().reset()

    def unseen(self) -> float:
        """See ``KVCache``."""
        seconds, self.unseen_s = self.unseen_s, 0.0
        return seconds

    def glance(self, length: int) -> Glance | None:
        """See ``KVCache``."""
        return self._seen[1] if self._seen is not None and self._seen[0] == length else None

    def sit(self, seat: Seat, room: list[tuple[Tensor, Tensor]]) -> None:
        """Move to a seat.

        Args:
            seat: what ``room`` belongs to.
            room: keys and values ``[1, heads, capacity, d]`` of each layer.
        """
        self.begun = None  # it writes where the sequence has sat
        for layer, (keys, values) in zip(self.layers, room, strict=True):
            layer.move(keys, values, seat)
        self.seat = seat

    def follow(self, token: int, length: int) -> Begun | None:
        """This token comes next, after so many: its step, if it is under way."""
        before, begun = self.glance(length), self.begun
        self.hits = self.hits + 1 if before is not None and before.best == token else 0
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
        if self.seat is None:
            return
        for layer in self.layers:
            layer.move(*(torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in layer.front), None)
        self.seat = None  # last: from here on the row is anybody's


def _only_none(value: Any) -> None:
    if value is not None:
        raise AttributeError("the keys and values of a StaticLayer are views of its buffers and cannot be set.")
