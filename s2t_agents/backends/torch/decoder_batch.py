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
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..base import Append, Output, ScoreCandidates, ScoreTree, StepOutput, Work
from .attention import (
    Attention,
    ChunkAttention,
    MixedAttention,
    OverlayAttention,
    PrefetchAttention,
    SingleTokenAttention,
)
from .kv_cache import PrefetchedToken
from .llama_decoder import LinearMap, LlamaDecoder
from .lora import Lora, LoraLayer
from .packed_batch import positions_of
from .packed_linear import FusedLinear

PREFETCHED = 2
"""Candidates whose next step is read along: nearly every pick is one of the SLM's two likeliest; each costs a row."""


class DecoderBatch:
    """The written-out forward of one model for chunks of tokens and candidates together.

    Args:
        decoder: the model's written-out decoder.
        base: the model, whose linear layers the corrections name.

    Attributes:
        decoder: as given.
        base: as given.
    """

    def __init__(self, decoder: LlamaDecoder, base: nn.Module) -> None:
        self.decoder, self.base = decoder, base
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
        hidden = self.decoder.rows(ids, positions, _attention_of(segments, scorings), self._correcting(ordered))
        ends = list(accumulate(len(segment.ids) for segment in segments))
        outputs: list[Output] = []
        if segments:
            last = hidden[[end - 1 for end in ends]]
            outputs += [
                StepOutput(*row) for row in zip(self.decoder.logits(last), (row.clone() for row in last), strict=True)
            ]
        rest = (
            torch.split(hidden[ends[-1] if ends else 0 :], [len(scoring.ids) for scoring in scorings])
            if scorings
            else []
        )
        for scoring, rows in zip(scorings, rest, strict=True):
            outputs.append(self.decoder.logits(rows) if isinstance(scoring, ScoreTree) else rows)
        return [outputs[order.index(at)] for at in range(len(parts))]

    @torch.inference_mode()
    def with_prefetch(self, scoring: ScoreCandidates) -> Tensor:
        """Candidate scoring, and the next step of the first candidates in the same forward, kept with the cache.

            row        c9.0 c9.1 | c9.0' c9.1' ... c9.7'       the two likeliest as the base reads them, then all K as
                                                               the adapter does
            pick 1     the KV and the hidden state of c9.1 are at hand: the next step is the output layer alone

        The base's rows go through the same kernels as a step of their own, so logits and KV are bitwise those of a
        separate step; where that does not hold (``PackedLinears.rows_alike``), this is not to be called. A pick that is
        not among the prefetched tokens costs a step as before.

        Returns:
            Last hidden states ``[K, H]``.
        """
        first = ScoreCandidates(scoring.ids[:PREFETCHED], scoring.cache, scoring.length)
        m, ids = len(first.ids), torch.cat([first.ids, scoring.ids])
        reading = PrefetchAttention(scoring.cache)
        over = MixedAttention([(m, reading), (len(scoring.ids), OverlayAttention(scoring))])
        hidden = self.decoder.rows(ids, [scoring.length] * len(ids), over, self._correcting([first, scoring]))
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

        linear = self.decoder.linear

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


def _attention_of(segments: Sequence[Append], scorings: Sequence[Work]) -> Attention:
    """Tokens over their own KV, which grows, then candidates over KV that stays."""
    single = [segment.cache for segment in segments if len(segment.ids) == 1]
    chunks = [segment for segment in segments if len(segment.ids) > 1]
    blocks: list[tuple[int, Attention]] = [
        *([(len(single), SingleTokenAttention(single))] if single else []),
        *((len(each.ids), ChunkAttention(each.cache, each.length)) for each in chunks),
        *((len(scoring.ids), OverlayAttention(scoring)) for scoring in scorings),
    ]
    return blocks[0][1] if len(blocks) == 1 else MixedAttention(blocks)
