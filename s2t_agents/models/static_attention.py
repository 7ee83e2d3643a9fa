"""Attention over KV of fixed capacity: shapes never change, what a token sees is a mask made on the device.

row of capacity C    | 0 .. position | hidden ........ |      sliding layers hide all before the window, too
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .lean import LeanLayer

SHORT = 2048
"""Capacity up to which one fused kernel is quick enough: it gives each key head to one core of a GPU."""

CHUNK = 256
"""Tokens that one core reads of longer rows; capacities are multiples of it."""


class StepAttention:
    """One new token for each row; its keys and values are written at its position.

    Args:
        keys: ``[N, key heads, C, d]`` of each layer.
        values: like keys.
        positions: ``[N]``, where each row's token stands.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], positions: Tensor) -> None:
        self._keys, self._values, self._positions = keys, values, positions
        self._rows = torch.arange(len(positions), device=positions.device)
        self._masks: dict[int | None, Tensor] = {}

    def __call__(self, layer: LeanLayer, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See ``lean.Attention``."""
        seen = self._seen(index, q.view(len(q), k.shape[1], -1, k.shape[-1]), k, v, layer.scale, layer.window)
        return seen.reshape(len(q), -1)

    def _seen(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """``[N, key heads, queries per key head, d]``, as ``q`` is."""
        keys, values = self._keys[layer], self._values[layer]
        keys[self._rows, :, self._positions] = k
        values[self._rows, :, self._positions] = v
        if window not in self._masks:
            ends = self._positions[:, None, None, None] + 1
            self._masks[window] = visible(ends, window, keys.shape[-2], q.dtype)
        mask = self._masks[window]
        if keys.shape[-2] <= SHORT:
            return functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)
        scores = q @ keys.transpose(-1, -2) * scale + mask
        return weighted(scores.softmax(-1, dtype=torch.float32).to(v.dtype), values)


class LookAttention:
    """K candidates after one row, each as if it alone had followed; the row is read and never written.

    Args:
        keys: ``[1, key heads, C, d]`` of each layer.
        values: like keys.
        length: ``[1]``, tokens in the row.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], length: Tensor) -> None:
        self._keys, self._values, self._length = keys, values, length
        self._masks: dict[int | None, Tensor] = {}

    def __call__(self, layer: LeanLayer, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See ``lean.Attention``: the prefix's scores and the candidate's own share one softmax."""
        block = q.view(len(q), k.shape[1], -1, k.shape[-1])
        return self._seen(index, block, k[:, :, None], v[:, :, None], layer.scale, layer.window).reshape(len(q), -1)

    def _seen(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """``[K, key heads, queries per key head, d]``, as ``q`` is; keys and values ``[K, key heads, 1, d]``."""
        keys, values = self._keys[layer], self._values[layer]
        candidates, heads, group, d = q.shape
        capacity = keys.shape[-2]
        if window not in self._masks:  # the candidate itself takes one place of the window
            self._masks[window] = visible(self._length, window and window - 1, capacity, q.dtype)
        block = q.transpose(0, 1).reshape(1, heads, candidates * group, d)
        before = block @ keys.transpose(-1, -2) * scale + self._masks[window]
        before = before.view(heads, candidates, group, capacity).transpose(0, 1)
        itself = (q * k).sum(-1, keepdim=True) * scale
        weights = torch.cat([before, itself], -1).softmax(-1, dtype=torch.float32).to(v.dtype)
        past = weights[..., :capacity].transpose(0, 1).reshape(1, heads, candidates * group, capacity)
        seen = weighted(past, values).view(heads, candidates, group, d).transpose(0, 1)
        return seen + weights[..., capacity:] * v


def visible(ends: Tensor, window: int | None, capacity: int, dtype: torch.dtype) -> Tensor:
    """Additive mask ``[..., C]``: 0 for the last ``window`` columns before ``ends`` ``[..., 1]``, -inf elsewhere."""
    columns = torch.arange(capacity, device=ends.device)
    seen = columns < ends
    if window is not None:
        seen = seen & (columns >= ends - window)
    return torch.zeros(seen.shape, dtype=dtype, device=ends.device).masked_fill_(~seen, -torch.inf)


def weighted(weights: Tensor, values: Tensor) -> Tensor:
    """``[N, heads, M, C]`` times ``[N, heads, C, d]``, chunks of C side by side and then added up."""
    n, heads, capacity, d = values.shape
    chunks = values.view(n, heads, capacity // CHUNK, CHUNK, d)
    parts = weights.view(n, heads, -1, capacity // CHUNK, CHUNK).transpose(2, 3) @ chunks
    return parts.sum(2)
