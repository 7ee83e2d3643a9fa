"""One token for each of many rows: the queries that share a key stand in one block, so that no key is repeated.

    queries   [B, heads, 1, d] ──> [B, key heads, heads / key heads, d]      keys, values   [B, key heads, T, d]

transformers repeats keys and values for every query head first; on a CPU that, and reading the copies, was most of a
step of twenty-five rows. The sums are the same, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from .packed_batch import attention_functions

NAME = "s2t_grouped"
"""Under which name transformers finds it."""


def attend_grouped(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """From queries ``[B, heads, 1, d]`` to ``[B, 1, heads, d]``; ``attention_mask`` is ``[B, 1, 1, T]``, or None."""
    batch, heads, _, d = query.shape
    blocks = query.reshape(batch, key.shape[1], -1, d)
    seen = functional.scaled_dot_product_attention(blocks, key, value, attn_mask=attention_mask, scale=scaling)
    return seen.reshape(batch, 1, heads, value.shape[-1]), None


@contextmanager
def grouped_attention(config: Any, tokens: int) -> Iterator[None]:
    """Inside the block a model that uses torch's own attention uses ours for single tokens. One thread at a time.

    Args:
        config: the decoder's.
        tokens: of each row.
    """
    own = config._attn_implementation
    if own != "sdpa" or tokens > 1:
        yield
        return
    _register()
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = own


@cache
def _register() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

    attention_functions().register(NAME, attend_grouped)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
