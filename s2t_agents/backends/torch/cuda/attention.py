"""Attention over KV of fixed capacity: shapes never change, what a token sees is a mask made on the device.

row of capacity C    | 0 .. position | hidden ........ |      sliding layers hide all before the window, too
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..attention import AttentionLayer, for_each
from ..fused_ops import EAGER, PointwiseOps

CHUNK = 512
"""Tokens of values that one core of a GPU reads; capacities are multiples of it."""


class DecodeAttention:
    """One new token for each row; its keys and values are written at its position.

    Args:
        kv: ``[2, N, key heads, C, d]`` of each layer: keys and values.
        positions: ``[N]``, where each row's token stands.
        ops: how everything but matrix products is computed.
    """

    def __init__(self, kv: Sequence[Tensor], positions: Tensor, ops: PointwiseOps = EAGER) -> None:
        self._kv, self._positions, self._ops = kv, positions, ops
        self._rows = torch.arange(len(positions), device=positions.device)
        self._masks: dict[int | None, Tensor] = {}

    def __call__(self, layer: AttentionLayer, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See ``attention.Attention``."""
        seen = self._seen(index, q.view(len(q), k.shape[1], -1, k.shape[-1]), k, v, layer.scale, layer.window)
        return seen.reshape(len(q), -1)

    def _seen(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """``[N, key heads, queries per key head, d]``, as ``q`` is."""
        keys, values = self._kv[layer]
        self._ops.write_kv(keys, values, self._rows, self._positions, k, v)
        if window not in self._masks:
            ends = self._positions[:, None, None, None] + 1
            self._masks[window] = visible(ends, window, keys.shape[-2], q.dtype)
        weights = self._ops.attention_weights(q @ keys.transpose(-1, -2), self._masks[window], scale)
        parts = weighted(weights, values)
        return parts[:, :, 0] if parts.shape[2] == 1 else self._ops.sum_splits(parts)


class PrefillAttention:
    """New tokens of one row, one after another; their keys and values are written at their positions.

    Args:
        kv: ``[2, rows, key heads, C, d]`` of each layer: keys and values.
        row: ``[1]``, which row.
        positions: ``[N]``, where the tokens stand.
        ops: how everything but matrix products is computed.
    """

    def __init__(self, kv: Sequence[Tensor], row: Tensor, positions: Tensor, ops: PointwiseOps = EAGER) -> None:
        self._kv, self._row, self._positions, self._ops = kv, row, positions, ops
        self._masks: dict[int | None, Tensor] = {}

    def __call__(self, layer: AttentionLayer, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See ``attention.Attention``."""
        (n, heads, _), (keys, values) = q.shape, self._kv[index]
        self._ops.write_kv(keys, values, self._row.expand(n), self._positions, k, v)
        if layer.window not in self._masks:
            self._masks[layer.window] = visible(self._positions[:, None] + 1, layer.window, keys.shape[-2], q.dtype)
        seen = functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            for_each(heads, keys.index_select(0, self._row)),
            for_each(heads, values.index_select(0, self._row)),
            attn_mask=self._masks[layer.window],
            scale=layer.scale,
        )
        return seen[0].transpose(0, 1).reshape(n, -1)


class CandidateAttention:
    """K candidates after one row, each as if it alone had followed; the row is read and never written.

    Args:
        kv: ``[2, 1, key heads, C, d]`` of each layer: keys and values.
        length: ``[1]``, tokens in the row.
        ops: how everything but matrix products is computed.
    """

    def __init__(self, kv: Sequence[Tensor], length: Tensor, ops: PointwiseOps = EAGER) -> None:
        self._kv, self._length, self._ops = kv, length, ops
        self._masks: dict[int | None, Tensor] = {}

    def __call__(self, layer: AttentionLayer, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See ``attention.Attention``: the prefix's scores and the candidate's own share one softmax."""
        keys, values = self._kv[index]
        (count, heads, d), window = k.shape, layer.window
        if window not in self._masks:  # the candidate itself takes one place of the window
            self._masks[window] = visible(self._length, window and window - 1, keys.shape[-2], q.dtype)
        q, k, v = q.view(count, heads, -1, d), k[:, :, None], v[:, :, None]
        before = q.transpose(0, 1).reshape(1, heads, -1, d) @ keys.transpose(-1, -2)
        past, itself = self._ops.candidate_weights(before, self._masks[window], q, k, layer.scale)
        return self._ops.candidate_outputs(weighted(past, values), itself, v)


def visible(ends: Tensor, window: int | None, capacity: int, dtype: torch.dtype) -> Tensor:
    """Additive mask ``[..., C]``: 0 for the last ``window`` columns before ``ends`` ``[..., 1]``, -inf elsewhere."""
    columns = torch.arange(capacity, device=ends.device)
    seen = columns < ends
    if window is not None:
        seen = seen & (columns >= ends - window)
    return torch.zeros(seen.shape, dtype=dtype, device=ends.device).masked_fill_(~seen, -torch.inf)


def weighted(weights: Tensor, values: Tensor) -> Tensor:
    """``[N, heads, M, C]`` times ``[N, heads, C, d]``, chunks of C side by side: ``[N, heads, chunks, M, d]``."""
    n, heads, capacity, d = values.shape
    chunks = values.view(n, heads, capacity // CHUNK, CHUNK, d)
    return weights.view(n, heads, -1, capacity // CHUNK, CHUNK).transpose(2, 3) @ chunks
