"""KV in buffers with room to grow: a new token is written in place, and nothing before it is copied.

    buffer   [1, heads, capacity, d]   | tokens 0..length-1 | room |
    keys     [1, heads, length, d]     a view of the front

transformers' own dynamic cache copies the whole prefix at every token. Candidate scoring (``candidate_overlay``) uses
the room, too: the content beyond ``length`` is undefined.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..base import SequenceCache
from .kv_memory import room

GRAIN = 256
"""Tokens by which a buffer grows at least."""


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
        keys, values = self.write(key_states, value_states)
        self._end_with(keys, values)
        return keys, values

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
            other._copy_from(self.keys.narrow(-2, 0, length), self.values.narrow(-2, 0, length))
        return other

    def repeated(self, rows: int) -> GrowingLayer:
        """So many rows with these tokens each, ``[rows, heads, length, d]``, to grow in lockstep."""
        other = GrowingLayer()
        if self.is_initialized:
            other._copy_from(*(each.expand(rows, -1, -1, -1) for each in (self.keys, self.values)))
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

    def _copy_from(self, keys: Tensor, values: Tensor) -> None:
        """Become these tokens ``[rows, heads, T, d]``, with the room that a sequence of theirs has."""
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        capacity = _capacity(keys.shape[-2])
        self._key_buffer, self._value_buffer = room(keys, capacity), room(values, capacity)
        self._set_length(keys.shape[-2])
        self.keys.copy_(keys)
        self.values.copy_(values)

    def _end_with(self, keys: Tensor, values: Tensor) -> None:
        """These views of the buffers are all its tokens now."""
        self.keys, self.values = keys, values

    def _set_length(self, length: int) -> None:
        self.keys = self._key_buffer.narrow(-2, 0, length)
        self.values = self._value_buffer.narrow(-2, 0, length)

    def _grow(self, needed: int) -> None:
        length = self.keys.shape[-2]
        capacity = _capacity(max(needed, length + length // 2))
        for name in ("_key_buffer", "_value_buffer"):
            old = getattr(self, name)
            new = room(old, capacity)
            new[..., :length, :] = old[..., :length, :]
            setattr(self, name, new)
        self._set_length(length)


def _capacity(tokens: int) -> int:
    """Of a buffer for so many tokens."""
    return -(-tokens // GRAIN) * GRAIN


@dataclass
class PrefetchedToken:
    """The step after a sequence, computed beforehand for some tokens (``DecoderBatch.with_prefetch``).

    Attributes:
        length: tokens in the sequence.
        ids: the tokens read, in the order of the rows below.
        hidden: ``[m, H]``.
        layers: keys and values ``[m, key heads, d]`` of each layer.
    """

    length: int
    ids: Sequence[int]
    hidden: Tensor
    layers: list[tuple[Tensor, Tensor]]

    def take(self, token: int, cache: KVCache) -> Tensor | None:
        """Append a token's KV to its sequence.

        Returns:
            The token's hidden state ``[1, H]``; None, and nothing has changed, if this token was not read.
        """
        if token not in self.ids or cache.get_seq_length() != self.length:
            return None
        row = self.ids.index(token)
        for layer, (keys, values) in zip(cache.layers, self.layers, strict=True):
            layer.update(keys[row : row + 1, :, None], values[row : row + 1, :, None])
        return self.hidden[row : row + 1]


class KVCache(Cache, SequenceCache):  # type: ignore[misc]
    """The KV cache of one sequence, all of it kept, for models whose every layer is attention; see ``SequenceCache``.

    Attributes:
        read: tokens whose forward is done in every layer.
        prefetched: the next step for some tokens, where candidate scoring has computed it on the way.
    """

    layer_class = GrowingLayer
    read = 0

    def __init__(self, layers: Sequence[GrowingLayer] | None = None) -> None:
        super().__init__(layer_class_to_replicate=self.layer_class)
        self.layers = list(layers or ())
        self.prefetched: PrefetchedToken | None = None

    @property
    def length(self) -> int:
        """Tokens in it."""
        return int(self.get_seq_length())

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(layer.nbytes for layer in self.layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens, as ``transformers`` spells ``truncate``."""
        self.drop_prefetched()
        self.read = 0
        super().crop(tokens_to_remove)
        self.read = self.length

    def truncate(self, length: int) -> None:
        """Forget all tokens after the first ``length``, also where a failed forward has written some layers only."""
        self.drop_prefetched()
        self.read = min(self.read, length)  # first: another thread may copy the front
        for layer in self.layers:
            extra = layer.get_seq_length() - length
            if extra > 0:
                layer.crop(-extra)

    def mark_read(self, length: int) -> None:
        """A forward over the first ``length`` tokens is done."""
        self.read = length

    def reset(self) -> None:
        """Forget everything."""
        self.drop_prefetched()
        self.read = 0
        super().reset()

    @torch.inference_mode()
    def fork(self, length: int) -> KVCache:
        """An independent cache with the first ``length`` tokens: a copy costs far less than reading them again."""
        other = type(self)([layer.clone(length) for layer in self.layers])
        other.read = min((layer.get_seq_length() for layer in other.layers), default=0)
        return other

    def park(self) -> None:
        """Its generation has ended: give back what only running sequences need. The tokens stay."""
        self.prefetched = None

    def close(self) -> None:
        """Give everything back."""
        self.drop_prefetched()
        self.read, self.layers = 0, []

    def drop_prefetched(self) -> None:
        """What was computed past its end does not hold any more."""
        self.prefetched = None


class RecurrentCache(DynamicCache, SequenceCache):  # type: ignore[misc]
    """The state of one sequence in a model with recurrent layers: it cannot be cut, only forked whole."""

    @property
    def length(self) -> int:
        """Tokens in it."""
        return int(self.get_seq_length())

    @property
    def read(self) -> int:
        """As ``length``."""
        return self.length

    @property
    def nbytes(self) -> int:
        """Bytes of attention layers' keys and values; recurrent states are not counted."""
        tensors = [getattr(layer, name, None) for layer in self.layers for name in ("keys", "values")]
        return sum(each.nbytes for each in tensors if each is not None)

    def fork(self, length: int) -> RecurrentCache:
        """An independent copy; ``length`` must be all of it.

        Raises:
            ValueError: another length.
        """
        if length != self.length:
            raise ValueError(f"a recurrent state of {self.length} tokens cannot be cut to {length}.")
        return copy.deepcopy(self)

    def truncate(self, length: int) -> None:
        """Cut the attention layers; recurrent states stay as they are, so the sequence has to be read again."""
        for layer in self.layers:
            if isinstance(layer, DynamicLayer) and layer.is_croppable and layer.get_seq_length() > length:
                layer.crop(length - layer.get_seq_length())

    def close(self) -> None:
        """Give everything back."""
        self.layers: list[Any] = []
