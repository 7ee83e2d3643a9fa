"""What stands between a model's matrix products: norms, rotary embeddings, gates, softmax; eager, or compiled by torch.

On a GPU a step of one token is a thousand small kernels that each do next to nothing. torch's compiler makes one of
every function here; where it cannot (no Triton, no C compiler), the function itself runs, and the log says so once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..statistics import logit_statistics

_log = logging.getLogger(__name__)

SIZES = 64
"""Kinds of inputs, in all models of a process, that a kernel is made for."""


def add_rms_norm(x: Tensor, change: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """``x + change``, and its RMS norm; all ``[N, H]``."""
    x = x + change
    return x, functional.rms_norm(x, weight.shape, weight, epsilon)


def rotary_embedding(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary positions on ``[N, heads, d]`` of both."""
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def rotary_embedding_concatenated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``rotary_embedding`` in fewer torch calls; a compiler makes one kernel of either."""
    both = _rotated(torch.cat((q, k), 1), cos, sin)
    q, k = both.split_with_sizes([q.shape[1], k.shape[1]], 1)
    return q, k


def silu_and_mul(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU gate, ``[N, H]``."""
    return functional.silu(gate) * up


def write_kv(keys: Tensor, values: Tensor, rows: Tensor, positions: Tensor, k: Tensor, v: Tensor) -> None:
    """Write ``k`` and ``v`` ``[N, heads, d]`` into ``[N, heads, C, d]`` each, one token at every row's position."""
    # Two buffers, not halves of one: of that, torch's compiler would copy all of it.
    keys[rows, :, positions] = k
    values[rows, :, positions] = v


def attention_weights(scores: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention weights ``[..., C]`` of products of queries and keys."""
    return (scores * scale + mask).softmax(-1, dtype=torch.float32).to(scores.dtype)


def candidate_weights(before: Tensor, mask: Tensor, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention weights of candidates that see a prefix and each itself.

    Args:
        before: ``[1, key heads, K * group, C]``, their products with the prefix's keys.
        mask: ``[1, 1, 1, C]``.
        q: ``[K, key heads, group, d]``.
        k: ``[K, key heads, 1, d]``.
        scale: of all products.

    Returns:
        Of the prefix, as ``before``, and of each itself, ``[1, key heads, K * group, 1]``.
    """
    own = ((q * k).sum(-1, dtype=torch.float32) * scale).transpose(0, 1).reshape(*before.shape[:-1], 1)
    scores = (before * scale + mask).float()
    top = torch.maximum(scores.amax(-1, keepdim=True), own)
    past, itself = (scores - top).exp(), (own - top).exp()
    total = past.sum(-1, keepdim=True) + itself
    return (past / total).to(before.dtype), (itself / total).to(before.dtype)


def candidate_outputs(parts: Tensor, itself: Tensor, v: Tensor) -> Tensor:
    """What candidates see, ``[K, heads * d]``.

    Args:
        parts: ``[1, key heads, chunks, K * group, d]``, what they see of the prefix.
        itself: ``[1, key heads, K * group, 1]``, the weight of each itself.
        v: ``[K, key heads, 1, d]``.
    """
    count, heads, _, d = v.shape
    past, own = parts.sum(2).view(heads, count, -1, d), itself.view(heads, count, -1, 1)
    return (past + own * v.transpose(0, 1)).transpose(0, 1).reshape(count, -1)


def sum_splits(parts: Tensor) -> Tensor:
    """``[N, heads, chunks, M, d]`` to ``[N, heads, M, d]``."""
    return parts.sum(2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


@dataclass(frozen=True)
class PointwiseOps:
    """One way to compute all of them; see the functions of these names."""

    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = add_rms_norm
    rotary_embedding: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = rotary_embedding
    silu_and_mul: Callable[[Tensor, Tensor], Tensor] = silu_and_mul
    write_kv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None] = write_kv
    attention_weights: Callable[[Tensor, Tensor, float], Tensor] = attention_weights
    candidate_weights: Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = candidate_weights
    candidate_outputs: Callable[[Tensor, Tensor, Tensor], Tensor] = candidate_outputs
    sum_splits: Callable[[Tensor], Tensor] = sum_splits
    logit_statistics: Callable[[Tensor, Tensor, Tensor], Tensor] = logit_statistics


EAGER = PointwiseOps(rotary_embedding=rotary_embedding_concatenated)
"""One torch call after another, as few as can be."""


@cache
def compiled_ops() -> PointwiseOps:
    """Each as few kernels as torch's compiler makes of it, for all sizes; made when first called."""
    return PointwiseOps(*(CompiledOp(each.default) for each in fields(PointwiseOps)))


class CompiledOp:
    """A function that runs compiled, or as it is from the first failure on.

    Args:
        function: tensors in, tensors out.
    """

    def __init__(self, function: Any) -> None:
        self._plain = function
        self._run: Callable[..., Any] = torch.compile(function, dynamic=True, fullgraph=True)

    def __call__(self, *args: Any) -> Any:
        """The function's result."""
        if self._run is self._plain:
            return self._plain(*args)
        try:
            with torch._dynamo.config.patch(recompile_limit=SIZES):
                return self._run(*args)
        except Exception as error:  # noqa: BLE001 - whatever keeps a compiler from working, the function still does
            first = f"{type(error).__name__}: {error}".splitlines()[0]
            _log.warning("%s goes on without being compiled: %s", self._plain.__name__, first)
            self._run = self._plain
            return self._plain(*args)
