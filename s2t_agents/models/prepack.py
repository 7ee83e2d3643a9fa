"""Linear maps on a CPU with weights that already lie as oneDNN multiplies them.

Given weights as a module holds them, oneDNN lays them out anew (or takes a slower kernel) at every call. Here that is
done once, as torch's own inductor does when it freezes a model, with the same two operators: a row is bound by reading
the weights, and eight cost little more than one. The price is a second copy of the weights, hence the limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .processor import lays_out

LIMIT = 4 * 1024**3
"""Bytes of weights that a model may hold twice; larger models keep one copy and torch's own kernels."""

ROWS = (2, 3, 4, 6, 10, 18, 34, 66)
"""Row counts in which it is tried whether a row among others is the row alone."""

LEAST = {torch.float32: 300_000, torch.bfloat16: 30_000}
"""Elements that a model's weights have on average where it gains; smaller ones lose more in the call than they win."""


class Prepacked:
    """The affine maps of some linear modules; see ``lean.Affine``.

    Args:
        modules: of one model; all are laid out here, or none.
        limit: bytes; a model with more keeps all its weights as they are.
    """

    def __init__(self, modules: Sequence[nn.Linear], limit: int = LIMIT) -> None:
        weights = [module.weight for module in modules]
        laid_out = gains(weights) and sum(weight.nbytes for weight in weights) <= limit
        self._weights = {module: (lay_out(module.weight), state_of(module.weight)) for module in modules if laid_out}

    def __len__(self) -> int:
        """How many weights lie here."""
        return len(self._weights)

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        """From inputs ``[N, in]`` to ``[N, out]``."""
        weight, known = self._weights.get(module, (None, None))
        if weight is None or known != state_of(module.weight):  # changed since: as the module holds it now
            return functional.linear(x, module.weight, module.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, module.bias, "none", [], "")
        return out

    @cached_property
    @torch.inference_mode()
    def rows_alike(self) -> bool:
        """Whether the weights lie here and a row among others is bitwise the row alone; tried once per shape."""
        shapes = {(module.weight.shape, module.bias is None): module for module in self._weights}
        return bool(shapes) and all(self._alike(module) for module in shapes.values())

    def _alike(self, module: nn.Linear) -> bool:
        x = torch.randn(max(ROWS), module.in_features, generator=torch.Generator().manual_seed(0))
        x = x.to(module.weight.dtype)
        first = self(module, x[:1])
        return all(torch.equal(self(module, x[:rows])[:1], first) for rows in ROWS)


def gains(weights: Sequence[Tensor]) -> bool:
    """Whether weights are multiplied faster here when laid out beforehand."""
    kinds = {(weight.device.type, weight.dtype) for weight in weights}
    if len(kinds) != 1:
        return False
    device, dtype = kinds.pop()
    average = sum(weight.numel() for weight in weights) / len(weights)
    return device == "cpu" and dtype in LEAST and average >= LEAST[dtype] and lays_out(dtype)


def lay_out(weight: Tensor) -> Tensor:
    """A copy of a weight ``[out, in]`` in the layout of its kernel."""
    with torch.inference_mode():
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 8)  # type: ignore[no-any-return]


def state_of(weight: Tensor) -> tuple[int, int, int]:
    """What changes when a weight is replaced or written to."""
    return id(weight), weight.data_ptr(), 0 if weight.is_inference() else weight._version
