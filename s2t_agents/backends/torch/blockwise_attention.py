"""Attention of a chunk of tokens on a CPU, as two matrix products for each block of queries.

    block of queries (fp32) · keys (fp32) ── mask, softmax ──> weights (the model's dtype) · values ──> what they see

Faster than torch's fused attention on a CPU, in fp32 and in bf16. A block sees only the keys up to its
own end, so that nearly half of the products of a prompt's beginning are not computed at all. Precision is that of the
fused one: scores and their softmax in fp32, whatever the model's dtype. In bf16, on a CPU with instructions for it, how
a prompt is cut into chunks changes the last bits of hardly a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cpu_features import is_emulated

ROWS = 128
"""Tokens per block, at most."""

SCORES = 4_000_000
"""Scores of a block, at most: with a long context before it, a block has fewer tokens."""


class BlockwiseAttention:
    """The attention of one chunk's tokens, layer after layer; all layers share its workspace."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}
        self._masks: dict[int, Tensor] = {}

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int | None) -> Tensor:
        """What the last n of a sequence's tokens see of it, ``[n, heads * d]``.

        Args:
            q: ``[n, heads, d]``.
            keys: ``[key heads, length, d]``, those of the n tokens last.
            values: as ``keys``.
            scale: of the scores.
            window: tokens that each sees, itself included; None sees all.
        """
        n, _, d = q.shape
        heads, length, _ = keys.shape
        transposed = self._cast("keys", torch.float32, keys).transpose(1, 2)
        if is_emulated(values.dtype):
            values = self._cast("values", torch.float32, values)
        q = q.view(n, heads, -1, d)
        out = torch.empty_like(q)
        block_rows = max(1, min(ROWS, SCORES // (q.shape[1] * q.shape[2] * length)))
        for start in range(0, n, block_rows):
            block = q[start : start + block_rows].permute(1, 2, 0, 3)
            rows, end = block.shape[2], length - n + start + block.shape[2]
            first = 0 if window is None else max(0, end - rows + 1 - window)
            scores = self._workspace("scores", q, torch.float32, *block.shape[:3], end - first)
            flat = scores.view(heads, -1, end - first)
            torch.baddbmm(
                flat, block.float().reshape(heads, -1, d), transposed[..., first:end], beta=0, alpha=scale, out=flat
            )
            scores[..., -rows:] += self._causal_mask(rows, scores)
            if window is not None and end > window:
                earlier = torch.ones_like(scores[0, 0], dtype=torch.bool).tril_(end - first - rows - window)
                scores.masked_fill_(earlier, -torch.inf)
            torch.softmax(flat, -1, out=flat)
            seen = torch.bmm(self._cast("weights", values.dtype, flat), values[:, first:end])
            out[start : start + rows] = seen.view(block.shape).permute(2, 0, 1, 3)
        return out.view(n, -1)

    def _causal_mask(self, rows: int, like: Tensor) -> Tensor:
        """``[rows, rows]``: -inf where a column's token comes after the row's, else 0."""
        if rows not in self._masks:
            self._masks[rows] = like.new_full((rows, rows), -torch.inf).triu_(1)
        return self._masks[rows]

    def _cast(self, name: str, dtype: torch.dtype, x: Tensor) -> Tensor:
        """A tensor in another dtype, good until the next of its name."""
        return x if x.dtype == dtype else self._workspace(name, x, dtype, *x.shape).copy_(x)

    def _workspace(self, name: str, like: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
        """An unwritten tensor, in the memory of the last one of its name where that is large enough."""
        size = torch.Size(shape).numel()
        if name not in self._memory or len(self._memory[name]) < size:
            self._memory[name] = like.new_empty(size, dtype=dtype)
        return self._memory[name][:size].view(shape)
