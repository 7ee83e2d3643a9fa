"""A step of few rows in Triton kernels: products with weights, and attention over rows of fixed capacity.

    linear      a program for every two outputs reads their weights once
    attention   row of capacity C | part 0 | part 1 | ... |     a program for each part and key head, then
                one for each query head, which joins the parts with the token's own key and value

A step is bound by reading weights, which these do for one row in 0.71 to 0.92 of the time that torch's products take
(measured on an H100); and a program for each part of a row keeps the whole device at it: parts that hold no token yet
are not read. Importing this needs Triton, which comes with torch's CUDA builds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import triton
from torch import Tensor

from ..attention import AttentionLayer
from ..fused_ops import PointwiseOps
from ..llama_decoder import BatchMetadata, LinearMap
from ..packed_linear import FusedLinear
from . import triton_kernels
from .decode_graphs import GraphBuilder

OUTPUTS = 2
"""Of a product, for each program."""

INPUTS = 1024
"""Of a product, that are read in one go; half as many where two weights are."""

PART = 64
"""Tokens of a row for each program, unless there would be more than ``PARTS``."""

PARTS = 96
"""Of a row, at most."""

TOGETHER = 8
"""Candidates whose queries one program takes at once."""

BLOCK = 32
"""Tokens that it takes at once: of few rows' queries twice as many."""

NARROWEST = 16
"""Rows and columns of the smallest matrices that Triton multiplies."""


class TritonGraphBuilder(GraphBuilder):
    """Bodies in which attention, and products of a single row, are kernels of their own."""

    def decode_metadata(self, kv: Sequence[Tensor], positions: Tensor, cos: Tensor, sin: Tensor) -> BatchMetadata:
        """See ``GraphBuilder``."""
        over = SplitKVAttention(kv, positions, cos, sin, writes=True)
        if len(positions) > 1:
            return BatchMetadata(cos, sin, over, self.llama_decoder.linear, self._ops)
        return BatchMetadata(cos, sin, over, self._affine, self._ops, self._gate)

    def candidate_metadata(
        self, kv: Sequence[Tensor], length: Tensor, cos: Tensor, sin: Tensor, affine: LinearMap
    ) -> BatchMetadata:
        """See ``GraphBuilder``."""
        return BatchMetadata(cos, sin, SplitKVAttention(kv, length, cos, sin, writes=False), affine, self._ops)

    @cached_property
    def _ops(self) -> PointwiseOps:
        return replace(self.ops, rotary_embedding=unrotated)

    def _affine(self, fused: FusedLinear, x: Tensor) -> tuple[Tensor, ...]:
        matrix = self.llama_decoder.linear.matrix(fused)
        return self.llama_decoder.linear(fused, x) if matrix is None else fused.split(linear(x, *matrix))

    def _gate(self, fused: FusedLinear, x: Tensor) -> Tensor:
        matrix = self.llama_decoder.linear.matrix(fused)
        if matrix is None or matrix[1] is not None:
            return self.ops.silu_and_mul(*self._affine(fused, x))
        return gate_up_silu(x, matrix[0])


def unrotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``SplitKVAttention`` rotates queries and keys itself."""
    return q, k


class SplitKVAttention:
    """Attention over rows of fixed capacity, split into parts.

    See ``attention.Attention``, but that queries and keys are not rotated yet.

    Args:
        kv: ``[2, N, key heads, C, d]`` of each layer: keys and values.
        ends: ``[N]``, tokens in each row.
        cos: ``[N, 1, d]``, rotations of the tokens after them.
        sin: as ``cos``.
        writes: one new token for each row joins it; else those of all rows are candidates, as many for each row, and
            rows are only read.
    """

    def __init__(self, kv: Sequence[Tensor], ends: Tensor, cos: Tensor, sin: Tensor, *, writes: bool) -> None:
        self._kv, self._ends, self._cos, self._sin, self._writes = kv, ends, cos, sin, writes

    def __call__(self, layer: AttentionLayer, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """From ``[n, heads, d]`` and ``[n, key heads, d]`` to ``[n, heads * d]``."""
        keys, values = self._kv[index]
        (n, heads, d), (rows, key_heads, capacity, _) = q.shape, keys.shape
        part = PART * triton.cdiv(capacity, PART * PARTS)
        parts, share, group = triton.cdiv(capacity, part), n // rows, heads // key_heads
        together = 1 if self._writes else math.gcd(share, TOGETHER)
        seen = q.new_empty(n, heads, parts, d, dtype=torch.float32)
        weights = q.new_empty(n, heads, parts, 2, dtype=torch.float32)
        out = q.new_empty(n, heads * d)
        rotation = self._cos, self._sin
        places = self._cos.stride(0), keys.stride(0), keys.stride(1), parts
        sizes = {
            "WINDOW": layer.window or 0,
            "SHARE": share,
            "GROUP": group,
            "D": d,
            "WIDE": max(NARROWEST, triton.next_power_of_2(d)),
            "PART": part,
        }
        _start(
            triton_kernels.attend_splits,
            (n // together, key_heads, parts),
            *(q, *rotation, keys, values, self._ends, seen, weights, layer.scale, q.stride(0), *places),
            **sizes,
            ROWS=together,
            M=max(NARROWEST, triton.next_power_of_2(together * group)),
            BLOCK=BLOCK if together > 1 else 2 * BLOCK,
        )
        strides = q.stride(0), k.stride(0), v.stride(0)
        _start(
            triton_kernels.merge_splits,
            (n, heads),
            *(q, k, v, *rotation, keys, values, self._ends, seen, weights, out, layer.scale, *strides, *places),
            **sizes,
            PARTS=triton.next_power_of_2(parts),
            WRITES=self._writes,
        )
        return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``[1, in]`` times ``[out, in]``, with a bias ``[out]`` or without: ``[1, out]``."""
    n_out, n_in = weight.shape
    out = x.new_empty(1, n_out)
    given = (x, weight, x if bias is None else bias, out, n_out)
    sizes = {"N_IN": n_in, "BIAS": bias is not None, "OUT": OUTPUTS, "IN": INPUTS}
    _start(triton_kernels.linear, (triton.cdiv(n_out, OUTPUTS),), *given, **sizes)
    return out


def gate_up_silu(x: Tensor, weight: Tensor) -> Tensor:
    """``[1, in]`` and gate and up, ``[2 * out, in]`` together, to ``silu(gate) * up``, ``[1, out]``."""
    n_out, n_in = weight.shape[0] // 2, weight.shape[1]
    out = x.new_empty(1, n_out)
    sizes = {"N_IN": n_in, "OUT": OUTPUTS, "IN": INPUTS // 2}
    _start(triton_kernels.gate_up_silu, (triton.cdiv(n_out, OUTPUTS),), x, weight, out, n_out, **sizes)
    return out


def _start(kernel: Any, grid: tuple[int, ...], *given: Any, **sizes: Any) -> None:
    """Begin a kernel, which is compiled when its sizes first occur.

    Raises:
        RuntimeError: it cannot be compiled here.
    """
    try:
        kernel[grid](*given, **sizes)
    except Exception as error:
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        raise RuntimeError(f"a Triton kernel cannot be made: {first}") from error
