"""Linear maps of the same rows as one product, on a CPU with weights that already lie as oneDNN multiplies them.

    fused linear (q, k, v)    rows [N, in] ──> [q | k | v] ──> q, k, v      one product where the model has three

Given weights as a module holds them, oneDNN lays them out anew (or takes a slower kernel) at every call. Here that is
done once, as torch's own inductor does when it freezes a model, with the same two operators: a row is bound by reading
the weights, and eight cost little more than one. The price is a second copy of the weights, hence the limit. On CUDA
there is none: the modules' own weights come to lie one after another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .cpu_features import supports_packed_weights

LIMIT = 4 * 1024**3
"""Bytes of weights that a model may hold twice; larger models keep one copy and torch's own kernels."""

ROWS = (2, 3, 4, 6, 10, 18, 34, 66)
"""Row counts in which it is tried whether a row among others is the row alone."""

LEAST = {torch.float32: 300_000, torch.bfloat16: 30_000}
"""Elements that a model's weights have on average where the layout gains; below, the call costs more than it wins."""


class FusedLinear:
    """Linear modules that map the same rows, and can do it in one product.

    Args:
        modules: with as many inputs each; all with a bias, or none.

    Attributes:
        widths: of their outputs.
    """

    def __init__(self, *modules: Any) -> None:
        self.modules = modules
        self._parameters = [module._parameters for module in modules]  # asked at every call: past nn.Module's lookups
        self.widths = [module.out_features for module in modules]

    def joined(self) -> tuple[Tensor, Tensor | None]:
        """Copies of the weights ``[out, in]`` and biases ``[out]``, one after another."""
        biases = [module.bias for module in self.modules]
        weight = torch.cat([module.weight.detach() for module in self.modules])
        return weight, None if biases[0] is None else torch.cat([bias.detach() for bias in biases])

    @torch.inference_mode(False)
    @torch.no_grad()
    def adjoin(self) -> tuple[Tensor, Tensor | None]:
        """Lay the modules' own weights one after another: they stay what they are, and are one matrix besides.

        Returns:
            As ``joined``, in the memory of the modules' parameters.
        """
        weight, bias = self.joined()
        for name, whole in (("weight", weight), ("bias", bias)):
            for module, part in zip(
                self.modules, torch.split(whole, self.widths) if whole is not None else (), strict=False
            ):
                getattr(module, name).data = part
        return weight, bias

    def split(self, out: Tensor) -> tuple[Tensor, ...]:
        """``[N, out]`` of all modules to that of each."""
        return (out,) if len(self.widths) == 1 else out.split_with_sizes(self.widths, -1)

    def state(self) -> tuple[tuple[int, int, int], ...]:
        """What changes when a weight or bias is replaced or written to."""
        return states_of(self._parameters)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """From ``[N, in]`` to each module's ``[N, out]``, as the modules themselves say it."""
        return tuple(functional.linear(x, module.weight, module.bias) for module in self.modules)


@dataclass(frozen=True)
class Copied:
    """A fused linear's weights as they lie here, and what the modules' own were like when they were copied."""

    weight: Tensor
    bias: Tensor | None
    state: tuple[tuple[int, int, int], ...]


class PackedLinears:
    """The affine maps of one model; see ``llama_decoder.LinearMap``.

    Args:
        fused_linears: all are held here, or none.
        limit: bytes; a model with more keeps all its weights as they are.
    """

    def __init__(self, fused_linears: Sequence[FusedLinear], limit: int = LIMIT) -> None:
        weights = [module.weight for fused in fused_linears for module in fused.modules]
        fits = sum(weight.nbytes for weight in weights) <= limit
        self.packed = fits and gains(weights)
        """Whether copies lie here as oneDNN multiplies them."""
        if self.packed or (fits and small(weights)):
            self._copies = {fused: self._copy(fused) for fused in fused_linears}
        elif on("cuda", weights):
            several = [fused for fused in fused_linears if len(fused.modules) > 1]
            self._copies = {fused: Copied(*fused.adjoin(), fused.state()) for fused in several}
        else:
            self._copies = {}
        self._parameters = [module._parameters for fused in self._copies for module in fused.modules]
        self._state = states_of(self._parameters)
        self._checked = False
        """Inside ``unchanging``: no weight differs from its copy."""

    @torch.inference_mode()
    def _copy(self, fused: FusedLinear) -> Copied:
        weight, bias = fused.joined()
        return Copied(pack(weight) if self.packed else weight, bias, fused.state())

    @contextmanager
    def unchanging(self) -> Iterator[None]:
        """Inside the block no weight changes: the copies are compared with the modules once, not at every call."""
        self._checked = self._state == states_of(self._parameters)
        try:
            yield
        finally:
            self._checked = False

    def __len__(self) -> int:
        """How many fused linears are held here."""
        return len(self._copies)

    def __call__(self, fused: FusedLinear, x: Tensor) -> tuple[Tensor, ...]:
        """From inputs ``[N, in]`` to each module's ``[N, out]``."""
        copy = self._current(fused)
        return fused(x) if copy is None else fused.split(self._product(copy, x))

    def matrix(self, fused: FusedLinear) -> tuple[Tensor, Tensor | None] | None:
        """Weight ``[out, in]`` and bias of all modules as one; None where they do not lie as one, row after row."""
        copy = self._current(fused)
        if copy is None and len(fused.modules) == 1:
            (module,) = fused.modules
            weight, bias = module.weight, module.bias
        elif copy is not None and not self.packed:
            weight, bias = copy.weight, copy.bias
        else:
            return None
        return (weight, bias) if weight.is_contiguous() else None

    def whole(self, fused: FusedLinear, x: Tensor) -> Tensor:
        """From inputs ``[N, in]`` to ``[N, out]`` of all modules in one tensor of its own."""
        copy = self._current(fused)
        return torch.cat(fused(x), -1) if copy is None else self._product(copy, x)

    def _current(self, fused: FusedLinear) -> Copied | None:
        """What lies here of a fused linear, unless its modules have changed since."""
        copy = self._copies.get(fused)
        return copy if copy is None or self._checked or copy.state == fused.state() else None

    def _product(self, copy: Copied, x: Tensor) -> Tensor:
        if not self.packed:
            return functional.linear(x, copy.weight, copy.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, copy.weight, copy.bias, "none", [], "")
        return out

    @cached_property
    @torch.inference_mode()
    def rows_alike(self) -> bool:
        """Whether the weights lie here and a row among others is bitwise the row alone; tried once per shape."""
        shapes = {(copy.weight.shape, copy.bias is None): fused for fused, copy in self._copies.items()}
        return self.packed and all(self._alike(fused) for fused in shapes.values())

    def _alike(self, fused: FusedLinear) -> bool:
        weight = fused.modules[0].weight
        x = torch.randn(max(ROWS), weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
        first = self(fused, x[:1])
        return all(
            torch.equal(out[:1], one) for rows in ROWS for out, one in zip(self(fused, x[:rows]), first, strict=True)
        )


def gains(weights: Sequence[Tensor]) -> bool:
    """Whether a model's weights are multiplied faster here when laid out beforehand."""
    dtypes = {weight.dtype for weight in weights}
    return on("cpu", weights) and len(dtypes) == 1 and supports_packed_weights(*dtypes) and not small(weights)


def small(weights: Sequence[Tensor]) -> bool:
    """Whether a model is so small that a product on the CPU costs its call more than its arithmetic."""
    average = sum(weight.numel() for weight in weights) / max(1, len(weights))
    return on("cpu", weights) and average < LEAST.get(weights[0].dtype, 0)


def on(device: str, weights: Sequence[Tensor]) -> bool:
    """Whether there are weights, all of them there."""
    return {weight.device.type for weight in weights} == {device}


def pack(weight: Tensor) -> Tensor:
    """A copy of a weight ``[out, in]`` in the layout of its kernel."""
    with torch.inference_mode():
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 8)  # type: ignore[no-any-return]


def states_of(parameters: Sequence[Mapping[str, Tensor | None]]) -> tuple[tuple[int, int, int], ...]:
    """``state_of`` of all parameters of some modules."""
    return tuple([state_of(each) for named in parameters for each in named.values() if each is not None])


def state_of(weight: Tensor) -> tuple[int, int, int]:
    """What changes when a weight is replaced or written to."""
    return id(weight), weight.data_ptr(), 0 if weight.is_inference() else weight._version
