"""KV of many rows in lockstep, in buffers with room to grow; a fork shares them until one of the two is written to."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..backends.torch.kv_cache import GrowingLayer


class RowsLayer(GrowingLayer):
    """One layer's keys and values of B rows, ``[B, heads, length, d]`` each."""

    _shared = False

    def fork(self) -> RowsLayer:
        """A layer that goes on from here by itself."""
        other = copy.copy(self)
        self._shared = other._shared = True
        return other

    def write(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """As in ``GrowingLayer``; buffers that a fork reads too are left to it."""
        if self._shared:
            self._grow(self.keys.shape[-2] + key_states.shape[-2])
            self._shared = False
        return super().write(key_states, value_states)

    def keep(self, rows: Tensor) -> None:
        """Only these rows, in this order; one may be there several times."""
        self._key_buffer, self._value_buffer = self.keys[rows], self.values[rows]
        self._shared = False
        self._set_length(self._key_buffer.shape[-2])


def fork_of(cache: Cache) -> Cache:
    """A cache of ``RowsLayer`` that goes on from here by itself; nothing is copied yet."""
    return Cache(layers=[layer.fork() for layer in cache.layers])


def joined(parts: Sequence[tuple[Sequence[int], Cache]], rows: int, length: int) -> Cache:
    """The KV of all rows, on the right of ``length`` columns, from parts that were read by themselves.

    Args:
        parts: the rows of each, and their KV.
        rows: B, of all parts.
        length: of the longest.
    """
    layers = []
    for index in range(len(parts[0][1].layers)):
        whole = []
        for name in ("keys", "values"):
            pieces = [(of, getattr(cache.layers[index], name)) for of, cache in parts]
            first = pieces[0][1]
            buffer = first.new_zeros(rows, first.shape[1], length, first.shape[-1])
            for of, piece in pieces:
                buffer[torch.tensor(of, device=buffer.device), :, length - piece.shape[-2] :] = piece
            whole.append(buffer)
        layer = RowsLayer()
        layer.update(*whole)
        layers.append(layer)
    return Cache(layers=layers)
