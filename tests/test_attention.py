"""Every attention of the written-out decoder is the definition, and what it does to KV is what its class promises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from s2t_agents.backends.base import ScoreCandidates, ScoreTree
from s2t_agents.backends.torch import attention, blockwise_attention
from s2t_agents.backends.torch.attention import Attention
from s2t_agents.backends.torch.cpu_features import supports_packed_weights
from s2t_agents.backends.torch.cuda import attention as pooled
from s2t_agents.backends.torch.kv_cache import KVCache

D, HEADS, KEY_HEADS, LAYERS, CAPACITY = 8, 4, 2, 2, pooled.CHUNK


@dataclass(frozen=True)
class Layer:
    scale: float
    window: int | None


KV = tuple[Tensor, Tensor]
"""Keys and values ``[n, key heads, d]``."""


def some_kv(tokens: int) -> KV:
    return torch.randn(tokens, KEY_HEADS, D), torch.randn(tokens, KEY_HEADS, D)


@dataclass
class Rows:
    """New rows and what each of them sees.

    Attributes:
        over: the attention.
        prefixes: of each row: the KV of its sequence before, by layer.
        beside: of each row: the new rows that it sees, itself last.
        kv_after: what the sequences' KV must be in a layer, and what it is, after the new rows' KV.
    """

    over: Attention
    prefixes: list[list[KV]]
    beside: list[list[int]]
    kv_after: Callable[[int, KV], list[tuple[KV, KV]]] = field(default=lambda index, new: [])


def cache_of(prefix: Sequence[KV]) -> KVCache:
    cache = KVCache()
    for index, each in enumerate(prefix):
        cache.update(*(part.transpose(0, 1)[None] for part in each), index)
    return cache


def held(cache: KVCache, index: int) -> KV:
    layer = cache.layers[index]
    return layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)


def joined(one: KV, other: KV) -> KV:
    return torch.cat([one[0], other[0]]), torch.cat([one[1], other[1]])


def some_prefix(tokens: int) -> list[KV]:
    return [some_kv(tokens) for _ in range(LAYERS)]


def single_tokens() -> Rows:
    prefixes = [some_prefix(tokens) for tokens in (5, 9, 1)]
    caches = [cache_of(prefix) for prefix in prefixes]

    def after(index: int, new: KV) -> list[tuple[KV, KV]]:
        own = [(new[0][row : row + 1], new[1][row : row + 1]) for row in range(3)]
        grown = [joined(prefix[index], each) for prefix, each in zip(prefixes, own, strict=True)]
        return list(zip(grown, (held(cache, index) for cache in caches), strict=True))

    return Rows(attention.SingleTokenAttention(caches), prefixes, [[0], [1], [2]], after)


def chunk(length: int, tokens: int = 4) -> Rows:
    prefix = some_prefix(length)
    cache = cache_of(prefix) if length else KVCache()
    return Rows(
        attention.ChunkAttention(cache, length),
        [prefix] * tokens,
        [list(range(row + 1)) for row in range(tokens)],
        lambda index, new: [(joined(prefix[index], new), held(cache, index))],
    )


def candidates() -> Rows:
    prefix = some_prefix(6)
    cache = cache_of(prefix)
    over = attention.OverlayAttention(ScoreCandidates(torch.tensor([1, 2, 3]), cache, 6))
    return Rows(over, [prefix] * 3, [[0], [1], [2]], lambda index, new: [(prefix[index], held(cache, index))])


def tree() -> Rows:
    prefix = some_prefix(6)
    cache = cache_of(prefix)
    over = attention.OverlayAttention(ScoreTree(torch.tensor([1, 2, 3, 4]), torch.tensor([-1, 0, 0, 2]), cache, 6))
    beside = [[0], [0, 1], [0, 2], [0, 2, 3]]
    return Rows(over, [prefix] * 4, beside, lambda index, new: [(prefix[index], held(cache, index))])


def prefetch() -> Rows:
    prefix = some_prefix(6)
    cache = cache_of(prefix)
    over = attention.PrefetchAttention(cache)
    return Rows(
        over,
        [prefix] * 2,
        [[0], [1]],
        lambda index, new: [(prefix[index], held(cache, index)), (new, over.layers[index])],
    )


def blocks() -> Rows:
    parts = [single_tokens(), chunk(7), candidates()]
    starts = [0, 3, 7]
    widths = [len(part.beside) for part in parts]
    return Rows(
        attention.MixedAttention([(width, part.over) for width, part in zip(widths, parts, strict=True)]),
        [prefix for part in parts for prefix in part.prefixes],
        [[start + row for row in rows] for start, part in zip(starts, parts, strict=True) for rows in part.beside],
        lambda index, new: [
            pair
            for start, width, part in zip(starts, widths, parts, strict=True)
            for pair in part.kv_after(index, (new[0][start : start + width], new[1][start : start + width]))
        ],
    )


def pool_of(prefixes: list[list[KV]]) -> list[Tensor]:
    """``[2, rows, key heads, C, d]`` of each layer."""
    kv = [torch.zeros(2, len(prefixes), KEY_HEADS, CAPACITY, D) for _ in range(LAYERS)]
    for row, prefix in enumerate(prefixes):
        for layer, (keys, values) in zip(kv, prefix, strict=True):
            layer[0, row, :, : len(keys)], layer[1, row, :, : len(keys)] = keys.transpose(0, 1), values.transpose(0, 1)
    return kv


def in_row(kv: Tensor, row: int, tokens: int) -> KV:
    return kv[0, row, :, :tokens].transpose(0, 1), kv[1, row, :, :tokens].transpose(0, 1)


def pooled_single_tokens() -> Rows:
    prefixes = [some_prefix(tokens) for tokens in (5, 9, 1)]
    kv = pool_of(prefixes)

    def after(index: int, new: KV) -> list[tuple[KV, KV]]:
        own = [(new[0][row : row + 1], new[1][row : row + 1]) for row in range(3)]
        grown = [joined(prefix[index], each) for prefix, each in zip(prefixes, own, strict=True)]
        return [(each, in_row(kv[index], row, len(each[0]))) for row, each in enumerate(grown)]

    return Rows(pooled.DecodeAttention(kv, torch.tensor([5, 9, 1])), prefixes, [[0], [1], [2]], after)


def pooled_chunk() -> Rows:
    prefixes = [some_prefix(3), some_prefix(7)]
    kv = pool_of(prefixes)
    return Rows(
        pooled.PrefillAttention(kv, torch.tensor([1]), torch.arange(7, 11)),
        [prefixes[1]] * 4,
        [list(range(row + 1)) for row in range(4)],
        lambda index, new: [
            (joined(prefixes[1][index], new), in_row(kv[index], 1, 11)),
            (prefixes[0][index], in_row(kv[index], 0, 3)),
        ],
    )


def pooled_candidates() -> Rows:
    prefixes = [some_prefix(6)]
    kv = pool_of(prefixes)
    before = [layer.clone() for layer in kv]
    return Rows(
        pooled.CandidateAttention(kv, torch.tensor([6])),
        prefixes * 3,
        [[0], [1], [2]],
        lambda index, new: [((before[index][0], before[index][1]), (kv[index][0], kv[index][1]))],
    )


ALL: list[Callable[[], Rows]] = [
    single_tokens,
    lambda: chunk(7),
    lambda: chunk(0),
    lambda: chunk(5, 2 * blockwise_attention.ROWS + 3),
    lambda: chunk(0, blockwise_attention.ROWS),
    candidates,
    tree,
    prefetch,
    blocks,
    pooled_single_tokens,
    pooled_chunk,
    pooled_candidates,
]
NAMES = (
    "single tokens,chunk,prompt,long chunk,long prompt,candidates,tree,prefetch,blocks,"
    "pooled tokens,pooled chunk,pooled candidates"
)


def by_definition(layer: Layer, q: Tensor, seen: KV) -> Tensor:
    """One row ``[heads, d]`` over the tokens that it sees, itself last, to ``[heads * d]``."""
    keys, values = (part[-layer.window :] if layer.window is not None else part for part in seen)
    out = []
    for head in range(HEADS):
        shared = head * KEY_HEADS // HEADS
        weights = (keys[:, shared] @ q[head] * layer.scale).softmax(0)
        out.append(weights @ values[:, shared])
    return torch.cat(out)


@pytest.mark.parametrize("window", [None, 1, 3, 8])
@pytest.mark.parametrize("make", ALL, ids=NAMES.split(","))
def test_each_row_sees_what_it_may_and_kv_is_as_promised(make: Callable[[], Rows], window: int | None) -> None:
    torch.manual_seed(0)
    rows, layer = make(), Layer(scale=0.3, window=window)
    for index in range(LAYERS):
        q, new = torch.randn(len(rows.beside), HEADS, D), some_kv(len(rows.beside))
        out = rows.over(layer, index, q, *new)
        for row, (prefix, beside) in enumerate(zip(rows.prefixes, rows.beside, strict=True)):
            seen = joined(prefix[index], (new[0][beside], new[1][beside]))
            assert torch.allclose(out[row], by_definition(layer, q[row], seen), atol=1e-5)
        for wanted, found in rows.kv_after(index, new):
            assert torch.equal(wanted[0], found[0])
            assert torch.equal(wanted[1], found[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shared", [1, 2, 3])
def test_single_tokens_see_the_same_in_half_precision_however_many_queries_share_a_key(
    shared: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    caches = [cache_of([tuple(part.to(dtype) for part in some_kv(tokens))]) for tokens in (1, 4, 17)]
    q, k, v = (torch.randn(3, heads, D).to(dtype) for heads in (shared * KEY_HEADS, KEY_HEADS, KEY_HEADS))
    out = attention.SingleTokenAttention(caches)(Layer(scale=0.3, window=None), 0, q, k, v)
    for row, cache in enumerate(caches):
        keys, values = (each.float().repeat_interleave(shared, dim=1).transpose(0, 1) for each in held(cache, 0))
        weights = (keys @ q[row].float()[..., None] * 0.3).softmax(1)
        seen = (weights * values).sum(1).flatten()
        torch.testing.assert_close(out[row].float(), seen, atol=1e-5 if dtype == torch.float32 else 0.02, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [2, 12, 200])
def test_a_chunk_is_as_exact_as_torchs_own_attention_in_any_precision(tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    prefix = [tuple(part.to(dtype) * 4 for part in some_kv(90))]
    q, k, v = (torch.randn(tokens, heads, D).to(dtype) * 4 for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    out = attention.ChunkAttention(cache_of(prefix), 90)(Layer(scale=0.3, window=None), 0, q, k, v)
    keys, values = (
        torch.cat(parts).repeat_interleave(HEADS // KEY_HEADS, dim=1).transpose(0, 1)[None]
        for parts in zip(prefix[0], (k, v), strict=True)
    )
    mask = attention.causal(tokens, 90 + tokens, None, like=q)

    def seen(like: Tensor) -> Tensor:
        parts = (each.to(like.dtype) for each in (q.transpose(0, 1)[None], keys, values, mask))
        found = torch.nn.functional.scaled_dot_product_attention(*parts, scale=0.3)
        return found[0].transpose(0, 1).reshape(tokens, -1).double()

    exact = seen(torch.zeros(1, dtype=torch.float64))
    own, fused = (out.double() - exact).abs(), (seen(q) - exact).abs()
    assert own.max() <= 2 * fused.max() + 1e-5
    assert own.mean() <= 1.5 * fused.mean() + 1e-6


@pytest.mark.parametrize("scores", [340 * HEADS * 9, 340 * HEADS, 340 * HEADS - 1, 1])  # less than a row's: row by row
def test_a_long_context_takes_smaller_blocks_and_says_the_same(monkeypatch: pytest.MonkeyPatch, scores: int) -> None:
    torch.manual_seed(0)
    prefix, layer = [some_kv(300)], Layer(scale=0.3, window=7)
    q, new = torch.randn(40, HEADS, D), some_kv(40)
    whole = attention.ChunkAttention(cache_of(prefix), 300)(layer, 0, q, *new)
    monkeypatch.setattr(blockwise_attention, "SCORES", scores)
    parts = attention.ChunkAttention(cache_of(prefix), 300)(layer, 0, q, *new)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-6)


@pytest.mark.skipif(not supports_packed_weights(torch.bfloat16), reason="no instructions for bf16")
@pytest.mark.parametrize("size", [7, 64, 300])
@pytest.mark.parametrize(("heads", "shared", "d"), [(2, 2, 8), (3, 3, 64), (8, 2, 128)])
def test_in_bf16_how_a_prompt_is_cut_changes_the_last_bits_of_hardly_a_row(
    heads: int, shared: int, d: int, size: int
) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1000, count, d).bfloat16() for count in (heads * shared, heads, heads))
    layer, cache = Layer(scale=d**-0.5, window=None), KVCache()
    whole = attention.ChunkAttention(KVCache(), 0)(layer, 0, q, k, v)
    parts = []
    for start in range(0, 1000, size):
        own = (each[start : start + size] for each in (q, k, v))
        parts.append(attention.ChunkAttention(cache, start)(layer, 0, *own))
    changed = (torch.cat(parts) != whole).any(1)
    assert changed.float().mean() < 0.02
    torch.testing.assert_close(torch.cat(parts), whole, atol=0.02, rtol=0.02)


def test_another_default_device_changes_nothing() -> None:
    torch.manual_seed(0)
    layer, (q, k, v) = (
        Layer(scale=0.3, window=20),
        (torch.randn(200, heads, D) for heads in (HEADS, KEY_HEADS, KEY_HEADS)),
    )
    whole = attention.ChunkAttention(KVCache(), 0)(layer, 0, q, k, v)
    with torch.device("meta"):
        found = attention.ChunkAttention(KVCache(), 0)(layer, 0, q, k, v)
    assert torch.equal(found, whole)
