"""Candidate scoring over KV that is never written: K candidates one token past a prefix, in one forward.

All K tokens stand in one row at position P = len(prefix). An additive mask lets each see the prefix and itself:

    columns:   prefix 0..P-1 | candidates
    row i:     0 0 0 ... 0   | 0 at i, -inf elsewhere        (sliding layers: -inf up to P - window)

The result equals K forwards of prefix + candidate (tests/test_candidate_overlay.py holds it to 1e-4 in fp32).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from .kv_cache import GrowingLayer

ATTENTION_KINDS = {"full_attention", "sliding_attention"}


class OverlayLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's KV, read only: ``update`` returns base and new together and keeps neither."""

    def __init__(self, base: DynamicLayer) -> None:
        super().__init__()
        self.base = base

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, heads, P + K, d]``: the base's, then the new ones.

        Where the base has room behind its end they are written there, which no reader of the base ever sees; else
        (batches, and wherever gradients flow) both are copied.
        """
        if isinstance(self.base, GrowingLayer):
            return self.base.write(key_states, value_states)
        if not self.base.is_initialized:  # an empty prefix
            return key_states, value_states
        keys = torch.cat([self.base.keys, key_states], dim=-2)
        return keys, torch.cat([self.base.values, value_states], dim=-2)

    def get_seq_length(self) -> int:
        """Tokens in the base."""
        return int(self.base.get_seq_length())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of base plus query."""
        sizes: tuple[int, int] = self.base.get_mask_sizes(query_length)
        return sizes


def overlay_of(base: Cache) -> Cache:
    """A cache that reads ``base`` and never changes it. Costs nothing: no tensor is copied."""
    return Cache(layers=[OverlayLayer(layer) for layer in base.layers])


def overlay_is_exact(config: Any) -> bool:
    """Whether a masked row is the same as K rows: only where every layer is plain or sliding attention.

    Linear attention, convolutions and other recurrent states see the row as a sequence; those models take
    ``cloned_rows`` instead.
    """
    return set(layer_kinds(config)) <= ATTENTION_KINDS


def layer_kinds(config: Any) -> list[str]:
    """The kind of every layer, as the config names them; models without ``layer_types`` are uniform."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return list(kinds)
    uniform = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    return [uniform] * int(config.num_hidden_layers)


def rows_mask(config: Any, seen: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """Additive mask for a batch of left-padded prefixes, each with its own row of candidates, for training.

    Args:
        config: the decoder's config, for its layer kinds and window.
        seen: ``[B, C]`` bool, False for padding.
        positions: ``[B, N]``, the position of each candidate among its row's tokens.
        dtype: of the mask.

    Returns:
        ``[B, 1, N, C + N]``, or one such per layer kind where the model mixes kinds.
    """
    batch, length = seen.shape
    n = positions.shape[1]
    itself = torch.eye(n, dtype=torch.bool, device=seen.device).expand(batch, n, n)
    ends = (positions + (~seen).sum(1, keepdim=True))[:, :, None]  # column of each candidate's position
    columns = torch.arange(length, device=seen.device)
    window = getattr(config, "sliding_window", None) or 0
    before = seen[:, None] & (columns < ends)
    masks: dict[str, Tensor] = {}
    for kind in dict.fromkeys(layer_kinds(config)):
        part = before & (columns > ends - window) if kind == "sliding_attention" else before
        visible = torch.cat([part, itself], dim=2)
        mask = torch.zeros(visible.shape, dtype=dtype, device=seen.device)
        masks[kind] = mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]
    return masks if len(masks) > 1 else next(iter(masks.values()))


def rows_of(base: Cache, rows: Tensor) -> Cache:
    """A new cache with some rows of a batch's KV, in the order given."""
    return Cache(layers=[_layer_of(layer, rows) for layer in base.layers])


def _layer_of(layer: DynamicLayer, rows: Tensor) -> DynamicLayer:
    part = DynamicLayer()
    if layer.is_initialized:
        part.lazy_initialization(layer.keys, layer.values)
        part.keys, part.values = layer.keys[rows], layer.values[rows]
    return part


def cloned_rows(base: Cache, rows: int) -> Cache:
    """``rows`` independent copies of a cache: for branches, and for models on which the overlay is not exact."""
    if all(isinstance(layer, GrowingLayer) for layer in base.layers):
        return Cache(layers=[layer.repeated(rows) for layer in base.layers])
    clone = copy.deepcopy(base)
    clone.reorder_cache(torch.zeros(rows, dtype=torch.long))  # row 0, so many times; linear layers know this too
    return clone
