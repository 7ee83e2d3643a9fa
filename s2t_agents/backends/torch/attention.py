"""Attention of the written-out decoder: one interface, one class for each kind of rows.

    SingleTokenAttention   one token for each of several sequences      joins its sequence's KV
    ChunkAttention         a chunk of one sequence's tokens             joins the sequence's KV
    OverlayAttention       K candidates, or a tree, after one sequence  whose KV stays as it is
    PrefetchAttention      tokens that each follow one sequence alone   KV is kept aside
    MixedAttention         rows that stand in blocks, each with its own

``cuda/attention.py`` and ``cuda/triton_decode.py`` have those over KV pools. ``tests/test_attention.py`` holds all of
them to the definition. Masks for the model's own modules are here, too: they are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ..base import ScoreCandidates, ScoreTree, Work
from .blockwise_attention import BlockwiseAttention
from .kv_cache import KVCache


class AttentionLayer(Protocol):
    """What attention needs to know of a layer.

    Attributes:
        scale: of the scores.
        window: tokens that each sees, itself included; None sees all.
    """

    @property
    def scale(self) -> float:
        """See above."""
        ...

    @property
    def window(self) -> int | None:
        """See above."""
        ...


class Attention(Protocol):
    """What N rows attend to in every layer, and where their keys and values go. One object for one forward."""

    def __call__(self, layer: AttentionLayer, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """From queries to ``[N, heads * d]``.

        Args:
            layer: whose queries these are.
            index: of the layer in the KV.
            q: ``[N, heads, d]``.
            k: ``[N, key heads, d]``.
            v: ``[N, key heads, d]``.
        """
        ...


class SingleTokenAttention:
    """One token per sequence over its own KV, which its key and value join.

    Args:
        caches: of each row's sequence.
    """

    def __init__(self, caches: Sequence[KVCache]) -> None:
        self._caches = caches

    def __call__(self, layer: AttentionLayer, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See ``Attention``."""
        return row_by_row(layer, q, k, v, [cache.layers[index].update for cache in self._caches])


class ChunkAttention:
    """A chunk of one sequence's tokens over those before it and itself; its KV joins the sequence's.

    Args:
        cache: of the sequence.
        length: tokens before the chunk.
    """

    def __init__(self, cache: KVCache, length: int) -> None:
        self._cache, self._length = cache, length
        self._masks: dict[int | None, Tensor] = {}
        self._blockwise = BlockwiseAttention()

    def __call__(self, layer: AttentionLayer, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See ``Attention``."""
        n, heads = q.shape[:2]
        keys, values = self._cache.update(k.transpose(0, 1)[None], v.transpose(0, 1)[None], index)
        if q.device.type == "cpu":
            return self._blockwise(q, keys[0], values[0], scale=layer.scale, window=layer.window)
        if layer.window not in self._masks:
            self._masks[layer.window] = causal(n, self._length + n, layer.window, like=q)
        mask, queries = self._masks[layer.window], q.transpose(0, 1)[None]
        keys, values = for_each(heads, keys), for_each(heads, values)
        seen = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=layer.scale)
        return seen[0].transpose(0, 1).reshape(n, -1)


class OverlayAttention:
    """Attention of candidates, or of a tree of tokens, over a prefix, their ancestors and themselves; in one block per
    key head.

    Args:
        scoring: the candidates, or the tree, and the KV cache of their sequence.
    """

    def __init__(self, scoring: Work) -> None:
        self._scoring = scoring
        self._masks: dict[int | None, Tensor] = {}

    def __call__(self, layer: AttentionLayer, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See ``Attention``."""
        n, heads, d = k.shape
        keys, values = self._scoring.cache.layers[index].write(k.transpose(0, 1)[None], v.transpose(0, 1)[None])
        shared = q.shape[1] // heads  # queries per key head
        block = q.view(n, heads, shared, d).permute(1, 0, 2, 3).reshape(1, heads, n * shared, d)
        if layer.window not in self._masks:
            seen = branches_of(self._scoring)
            assert seen is not None
            mask = branching(seen, keys.shape[-2], layer.window, like=q)
            self._masks[layer.window] = mask.repeat_interleave(shared, dim=2)
        mask = self._masks[layer.window]
        out = functional.scaled_dot_product_attention(block, keys, values, attn_mask=mask, scale=layer.scale)
        return out.view(heads, n, shared, d).transpose(0, 1).reshape(n, -1)


@dataclass
class PrefetchAttention:
    """Attention of rows that each follow the same sequence alone, as a step would; their KV is kept aside.

    Attributes:
        cache: the sequence's KV; left as it is.
        layers: keys and values ``[m, key heads, d]`` of the layers gone through.
    """

    cache: KVCache
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, layer: AttentionLayer, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See ``Attention``."""
        self.layers.append((k.clone(), v.clone()))
        write = self.cache.layers[index].write
        return row_by_row(layer, q, k, v, [write] * len(q))


class MixedAttention:
    """Rows that stand in blocks, each with its own attention.

    Args:
        blocks: how many rows, and their attention; at least one.
    """

    def __init__(self, blocks: Sequence[tuple[int, Attention]]) -> None:
        self._widths, self._attentions = [rows for rows, _ in blocks], [each for _, each in blocks]

    def __call__(self, layer: AttentionLayer, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See ``Attention``."""
        parts = zip(self._attentions, *(torch.split(each, self._widths) for each in (q, k, v)), strict=True)
        return torch.cat([attend(layer, index, *own) for attend, *own in parts])


def for_each(heads: int, shared: Tensor) -> Tensor:
    """Keys, or values, ``[1, key heads, n, d]`` as every one of the query heads sees them, ``[1, heads, n, d]``."""
    each = heads // shared.shape[1]
    return shared[:, :, None].expand(-1, -1, each, -1, -1).reshape(1, heads, *shared.shape[2:])


Placing = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Puts a key and a value ``[1, key heads, 1, d]`` behind a sequence's own and gives all ``[1, key heads, n, d]``."""


def row_by_row(layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, places: Sequence[Placing]) -> Tensor:
    """Attention row by row, each over what its place gives; shapes as in ``Attention``."""
    n, heads, d = k.shape
    # Queries that share a key stand in one block: attention then runs on the key heads, nothing is repeated.
    q, k, v = q.view(n, heads, -1, d), k[:, :, None], v[:, :, None]
    queries, q = q.shape[2], two_rows_at_least(q)
    out = []
    for place, query, key, value in zip(places, *(each.chunk(n) for each in (q, k, v)), strict=True):
        keys, values = place(key, value)
        if layer.window is not None:
            keys, values = keys[..., -layer.window :, :], values[..., -layer.window :, :]
        out.append(functional.scaled_dot_product_attention(query, keys, values, scale=layer.scale))
    together = out[0] if n == 1 else torch.cat(out)
    return together[:, :, :queries].reshape(n, -1)


def two_rows_at_least(q: Tensor) -> Tensor:
    """Queries ``[n, key heads, m, d]``; with m = 1, in half precision on a CPU, each stands there twice.

    torch's attention multiplies matrices there; for a single row in half precision it has no fast kernel.
    """
    slow = q.shape[2] == 1 and q.dtype != torch.float32 and q.device.type == "cpu"
    return q.expand(-1, -1, 2, -1) if slow else q


def causal(tokens: int, length: int, window: int | None, *, like: Tensor) -> Tensor:
    """Additive mask ``[1, 1, tokens, length]`` of the last ``tokens`` of ``length``, within a window if any."""
    ends = torch.arange(length - tokens, length, device=like.device)[:, None]
    columns = torch.arange(length, device=like.device)[None]
    hidden = columns > ends
    if window is not None:
        hidden = hidden | (columns <= ends - window)
    mask = torch.zeros(tokens, length, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(hidden, torch.finfo(like.dtype).min)[None, None]


def branches_of(part: Work) -> Tensor | None:
    """``[T, T]`` bool: which of a part's tokens each of them sees; None where each sees those before it."""
    if isinstance(part, ScoreCandidates):
        return torch.eye(len(part.ids), dtype=torch.bool)
    return part.ancestors if isinstance(part, ScoreTree) else None


def branching(seen: Tensor, length: int, window: int | None, *, like: Tensor) -> Tensor:
    """Additive mask ``[1, 1, T, length]`` of tokens that branch off a prefix.

    Args:
        seen: ``[T, T]`` bool: which of the new tokens each of them sees, itself included; the last of ``length``.
        length: of prefix and new tokens.
        window: how far each sees, itself included.
        like: dtype and device of the mask.
    """
    tokens = len(seen)
    depth = seen.sum(1, keepdim=True)
    columns = torch.arange(length - tokens)[None]
    prefix = (
        torch.ones(tokens, 1, dtype=torch.bool) if window is None else columns > length - tokens + depth - 1 - window
    )
    near = seen if window is None else seen & (depth - depth.T < window)
    hidden = ~torch.cat([prefix.expand(tokens, length - tokens), near], dim=1).to(like.device)
    mask = torch.zeros(tokens, length, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(hidden, torch.finfo(like.dtype).min)[None, None]
