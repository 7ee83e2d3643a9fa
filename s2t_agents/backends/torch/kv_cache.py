"""KV in buffers with room to grow: a new token is written in place, and nothing before it is copied.

    buffer   [1, heads, capacity, d]   | tokens 0..length-1 | room |
    keys     [1, heads, length, d]     a view of the front

transformers' own dynamic cache copies the whole prefix at every token. Overlays (``overlay``) use the room, too: what
stands behind ``length`` is nobody's.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

if TYPE_CHECKING:
    from .logit_statistics import Glance
    from .next_token_prefetch import Ahead

GRAIN = 256
"""Tokens by which a buffer grows at least."""


_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}


def room(like: Tensor, capacity: int) -> Tensor:
    """An unwritten buffer ``[..., capacity, d]`` for tensors ``[..., T, d]``.

    On a CPU it is a mapping of its own. KV stays for long among much that does not: in the C library's heap it would
    keep whole stretches of freed memory from the system.
    """
    shape = (*like.shape[:-2], capacity, like.shape[-1])
    size = math.prod(shape) * like.element_size()
    if like.device.type == "cpu" and size:
        with suppress(OSError):  # as many mappings as the system allows: then the heap, after all
            return torch.frombuffer(mmap.mmap(-1, size, **_PRIVATE), dtype=like.dtype).view(shape)
    return like.new_empty(shape)


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values of one sequence; ``keys`` and ``values`` are views of the buffers' front."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the buffers, as the first tokens' shapes say."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._key_buffer, self._value_buffer = room(key_states, 0), room(value_states, 0)
        self._set_length(0)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[1, heads, T, d]``; returns all keys and values, ``[1, heads, length + T, d]``."""
        self.write(key_states, value_states)
        self._set_length(self.keys.shape[-2] + key_states.shape[-2])
        return self.keys, self.values

    def write(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Put tokens behind the end without making them part of it.

        Returns:
            Keys and values with them, ``[1, heads, length + T, d]``: good until the next write.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        if end > self._key_buffer.shape[-2]:
            self._grow(end)
        self._key_buffer.narrow(-2, start, end - start).copy_(key_states)
        self._value_buffer.narrow(-2, start, end - start).copy_(value_states)
        return self._key_buffer.narrow(-2, 0, end), self._value_buffer.narrow(-2, 0, end)

    def clone(self, length: int) -> GrowingLayer:
        """A layer of its own with the first ``length`` tokens."""
        other = type(self)()
        if self.is_initialized:
            other.lazy_initialization(self.keys, self.values)
            other.update(self.keys[..., :length, :], self.values[..., :length, :])
        return other

    def repeated(self, rows: int) -> GrowingLayer:
        """So many rows with these tokens each, ``[rows, heads, length, d]``, to grow in lockstep."""
        other = GrowingLayer()
        if self.is_initialized:
            keys, values = (each.expand(rows, -1, -1, -1) for each in (self.keys, self.values))
            other.lazy_initialization(keys, values)
            other.update(keys, values)
        return other

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, their room included."""
        return int(self._key_buffer.nbytes + self._value_buffer.nbytes) if self.is_initialized else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens."""
        super().crop(tokens_to_remove)
        if self.is_initialized:
            self._set_length(self.keys.shape[-2])

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._key_buffer = self._value_buffer = torch.empty(0)

    def _set_length(self, length: int) -> None:
        self.keys = self._key_buffer.narrow(-2, 0, length)
        self.values = self._value_buffer.narrow(-2, 0, length)

    def _grow(self, needed: int) -> None:
        length = self.keys.shape[-2]
        capacity = -(-max(needed, length + length // 2) // GRAIN) * GRAIN
        for name in ("_key_buffer", "_value_buffer"):
            old = getattr(self, name)
            new = room(old, capacity)
            new[..., :length, :] = old[..., :length, :]
            setattr(self, name, new)
        self._set_length(length)


class KVCache(Cache):  # type: ignore[misc]
    """The KV of one sequence, all of it kept, for models whose every layer is attention."""

    layer_class = GrowingLayer
    front_stays = True
    """What has been written is at nobody else's disposal while its sequence goes on; see ``live_prefixes``."""

    def __init__(self, layers: Sequence[GrowingLayer] | None = None) -> None:
        super().__init__(layer_class_to_replicate=self.layer_class)
        self.layers = list(layers or ())
        self.ahead: Ahead | None = None
        """The next step, for some tokens, where a selection has read it; see ``ahead``."""
        self.read = 0
        """Tokens whose forward is done: every layer holds them; see ``live_prefixes``."""

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens, and what was read past the end."""
        self.forget_ahead()
        self.read = 0
        super().crop(tokens_to_remove)
        self.read = self.get_seq_length()

    def reset(self) -> None:
        """Forget everything."""
        self.forget_ahead()
        self.read = 0
        super().reset()

    @torch.inference_mode()
    def clone(self, length: int) -> KVCache:
        """A cache of its own with the first ``length`` tokens: copying them costs far less than reading them again."""
        other = type(self)([layer.clone(length) for layer in self.layers])
        other.read = min((layer.get_seq_length() for layer in other.layers), default=0)
        return other

    def rest(self) -> None:
        """Its generation has ended: give back what only running ones need. The tokens stay."""
        self.ahead = None

    def forget_ahead(self) -> None:
        """Nothing that was read past its end holds any more."""
        self.ahead = None

    def glance(self, length: int) -> Glance | None:
        """What the step that made it so many tokens long has fetched along with it, where it has."""
        return None

    def unseen(self) -> float:
        """Seconds of its last step that the device has worked while nobody was waiting for it; asked once."""
        return 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(layer.nbytes for layer in self.layers)
