"""Candidates, single tokens and chunks of several sequences in one forward of ``llama_decoder``.

    row        a7 | b3 b4 b5 | c9.0 c9.1 ... c9.7        one token of a, three of b, K candidates of c
    linear     every row sees the same weights, read once; a LoRA is added to c's rows only
    attention  a7 sees a0..a7; b4 sees b0..b4; each c9.i sees c0..c8 and itself

The candidates' keys and values stand behind the end of c's KV, where no reader looks (``candidate_overlay``): no copy,
no undo. All K candidates that share a key head are one block of queries, so each layer's
attention is one call per sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..base import Append, Output, ScoreCandidates, ScoreTree, StepOutput, Work
from .kv_cache import PrefetchedToken
from .llama_decoder import Attention, DecoderLayer, LinearMap, LlamaDecoder, appending, following
from .lora import Lora, LoraLayer
from .next_token_prefetch import PREFETCHED, PrefetchAttention
from .packed_batch import branches_of, branching, positions_of
from .packed_linear import FusedLinear


class DecoderBatch:
    """The written-out forward of one model for chunks of tokens and candidates together.

    Args:
        step: the model's written-out decoder.
        base: the model, whose linear layers the corrections name.

    Attributes:
        step: as given.
        base: as given.
    """

    def __init__(self, step: LlamaDecoder, base: nn.Module) -> None:
        self.step, self.base = step, base
        self._layers: WeakKeyDictionary[Lora, dict[nn.Module, LoraLayer]] = WeakKeyDictionary()

    @torch.inference_mode()
    def __call__(self, parts: Sequence[Work]) -> list[Output]:
        """The model's output after each part.

        Args:
            parts: tokens, over a KV of their own that grows by them; candidate scorings and trees, whose KV stays as it
                is. What follows an append to the same KV in ``parts`` comes after its tokens.

        Returns:
            In the order of ``parts``: logits ``[V]`` (fp32) and last hidden state ``[H]`` after a segment's last
            token, last hidden states ``[K, H]`` of candidate scoring, logits ``[N, V]`` of a tree.
        """
        order = sorted(range(len(parts)), key=lambda at: _place(parts[at]))
        ordered = [parts[at] for at in order]
        segments = [part for part in ordered if isinstance(part, Append)]
        scorings = [part for part in ordered if not isinstance(part, Append)]
        ids = torch.cat([part.ids for part in ordered])
        positions = [at for part in ordered for at in positions_of(part)]
        hidden = self.step.rows(ids, positions, _side_by_side(_blocks(segments, scorings)), self._correcting(ordered))
        ends = list(accumulate(len(segment.ids) for segment in segments))
        outputs: list[Output] = []
        if segments:
            last = hidden[[end - 1 for end in ends]]
            outputs += [
                StepOutput(*row) for row in zip(self.step.logits(last), (row.clone() for row in last), strict=True)
            ]
        rest = (
            torch.split(hidden[ends[-1] if ends else 0 :], [len(scoring.ids) for scoring in scorings])
            if scorings
            else []
        )
        for scoring, rows in zip(scorings, rest, strict=True):
            outputs.append(self.step.logits(rows) if isinstance(scoring, ScoreTree) else rows)
        return [outputs[order.index(at)] for at in range(len(parts))]

    @torch.inference_mode()
    def with_prefetch(self, scoring: ScoreCandidates[Any]) -> Tensor:
        """Candidate scoring, and the next step of the first candidates, kept with the cache (``next_token_prefetch``).

        Returns:
            Last hidden states ``[K, H]``.
        """
        first = ScoreCandidates(scoring.ids[:PREFETCHED], scoring.cache, scoring.length)
        m, ids = len(first.ids), torch.cat([first.ids, scoring.ids])
        reading = PrefetchAttention(scoring.cache)
        over = _side_by_side([(m, reading), (len(scoring.ids), OverlayAttention(scoring))])
        hidden = self.step.rows(ids, [scoring.length] * len(ids), over, self._correcting([first, scoring]))
        scoring.cache.prefetched = PrefetchedToken(scoring.length, first.ids.tolist(), hidden[:m], reading.layers)
        return hidden[m:]

    def _correcting(self, ordered: Sequence[Work]) -> LinearMap:
        """The linear maps, with each adapter's corrections on the rows of its own tokens and candidates."""
        adapted: list[tuple[slice, dict[nn.Module, LoraLayer]]] = []
        start = 0
        for lora, group in groupby(ordered, key=lambda part: part.lora):
            end = start + sum(len(part.ids) for part in group)
            if lora is not None:
                adapted.append((slice(start, end), self.corrections(lora)))
            start = end

        linear = self.step.linear

        def affine(fused: FusedLinear, x: Tensor) -> tuple[Tensor, ...]:
            outputs = linear(fused, x)
            for rows, layers in adapted:
                for module, out in zip(fused.modules, outputs, strict=True):
                    layer = layers.get(module)
                    if layer is not None:
                        layer.add_to(out[rows], x[rows])
            return outputs

        return affine

    def corrections(self, lora: Lora) -> dict[nn.Module, LoraLayer]:
        """An adapter's corrections by the module that they correct; looked up once per adapter."""
        if lora not in self._layers:
            self._layers[lora] = lora.by_module(self.base)
        return self._layers[lora]


def _place(part: Work) -> tuple[int, int]:
    """Single tokens, chunks, then candidates; of each, those of one adapter adjacent: it corrects one block of rows."""
    kind = int(len(part.ids) > 1) if isinstance(part, Append) else 2
    return kind, 0 if part.lora is None else id(part.lora)


def _blocks(segments: Sequence[Append[Any]], scorings: Sequence[Work]) -> list[tuple[int, Attention]]:
    """Tokens over their own KV, which grows, then candidates over KV that stays: how many rows, and their attention."""
    single = [segment.cache for segment in segments if len(segment.ids) == 1]
    chunks = [segment for segment in segments if len(segment.ids) > 1]
    return [
        *([(len(single), appending(single))] if single else []),
        *((len(each.ids), following(each.cache, each.length)) for each in chunks),
        *((len(scoring.ids), OverlayAttention(scoring)) for scoring in scorings),
    ]


def _side_by_side(blocks: Sequence[tuple[int, Attention]]) -> Attention:
    """The attention of rows that stand in blocks, each with its own."""
    if len(blocks) == 1:
        return blocks[0][1]
    widths = [rows for rows, _ in blocks]

    def attend(layer: DecoderLayer, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(blocks, *(torch.split(each, widths) for each in (q, k, v)), strict=True)
        return torch.cat([over(layer, index, *own) for (_, over), *own in parts])

    return attend


class OverlayAttention:
    """Attention of candidates, or of a tree of tokens, over a prefix, their ancestors and themselves; in one block per
    key head.

    Args:
        scoring: the candidates, or the tree, and the KV cache of their sequence.
    """

    def __init__(self, scoring: Work) -> None:
        self._look = scoring
        self._masks: dict[int | None, Tensor] = {}

    def __call__(self, layer: DecoderLayer, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """From queries ``[K, heads, d]``, keys and values ``[K, key heads, d]`` to ``[K, heads * d]``."""
        n, heads, d = k.shape
        keys, values = self._look.cache.layers[index].write(k.transpose(0, 1)[None], v.transpose(0, 1)[None])
        shared = q.shape[1] // heads  # queries per key head
        block = q.view(n, heads, shared, d).permute(1, 0, 2, 3).reshape(1, heads, n * shared, d)
        if layer.window not in self._masks:
            seen = branches_of(self._look)
            assert seen is not None
            mask = branching(seen, keys.shape[-2], layer.window, like=q)
            self._masks[layer.window] = mask.repeat_interleave(shared, dim=2)
        mask = self._masks[layer.window]
        out = functional.scaled_dot_product_attention(block, keys, values, attn_mask=mask, scale=layer.scale)
        return out.view(heads, n, shared, d).transpose(0, 1).reshape(n, -1)
