"""The next step, read beside a selection's candidates: one forward for both.

    row        c9.0 c9.1 | c9.0' c9.1' ... c9.7'       the two likeliest candidates as the base reads them,
                                                       then all K as the adapter does
    pick 1     the KV and the hidden state of c9.1 are at hand: the next step is the output layer alone

The base's rows go through the same kernels as a step of their own, so logits and KV are bitwise those of a separate
step; where that does not hold (``PackedLinears.rows_alike``), nothing is prefetched. A pick that is not among the
prefetched tokens costs a step as before.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .kv_cache import KVCache
from .llama_decoder import DecoderLayer, row_by_row

PREFETCHED = 2
"""Candidates whose next step is read: nearly every pick is one of the SLM's two likeliest, and each costs a row."""


@dataclass
class PrefetchAttention:
    """Attention of rows that each follow the same sequence alone, as a step would; their KV is kept aside.

    Attributes:
        cache: the sequence's KV; left as it is.
        layers: keys and values ``[m, key heads, d]`` of the layers gone through.
    """

    cache: KVCache
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, layer: DecoderLayer, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See ``Attention``."""
        self.layers.append((k.clone(), v.clone()))
        write = self.cache.layers[index].write
        return row_by_row(layer, q, k, v, [write] * len(q))
