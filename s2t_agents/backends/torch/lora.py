"""Low-rank corrections that exist only inside a ``with`` block; outside it the base model is untouched.

Forward hooks are put on when the block is entered and taken off when it is left: a plain step of the base runs
without a single extra instruction, so its logits and KV stay bitwise its own. (PEFT's ``disable_adapter`` costs
32 ms on 28 layers, ours well under one.) Files on disk are PEFT's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ...atomic_write import write_whole
from ...errors import AdapterMismatch
from .loading import read_tensors
from .peft_config import PeftConfig, save_peft_config

PEFT_PREFIX = "base_model.model."
EVERY_ROW = slice(None)


class LoraLayer(nn.Module):
    """``x -> x A^T B^T * alpha / r`` with A ``[r, in]``, B ``[out, r]``; B starts at zero, so it starts as nothing."""

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, in_features))
        self.b = nn.Parameter(torch.zeros(out_features, rank))
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank
        nn.init.kaiming_uniform_(self.a, a=5**0.5)

    def extra_repr(self) -> str:
        """Its scale, which no tensor tells."""
        return f"scale={self.scale}"

    def forward(self, x: Tensor) -> Tensor:
        """The correction for inputs ``[..., in]``, as ``[..., out]``."""
        low = nn.functional.linear(x.to(self.a.dtype), self.a)
        return nn.functional.linear(low, self.b).to(x.dtype) * self.scale

    def add_to(self, out: Tensor, x: Tensor) -> None:
        """Add the correction for inputs ``[N, in]`` to outputs ``[N, out]``, in place; without gradients."""
        low = nn.functional.linear(x.to(self.a.dtype), self.a)
        if self.b.dtype == out.dtype:
            out.addmm_(low, self.b.t(), alpha=self.scale)
        else:
            out.add_(low @ self.b.t(), alpha=self.scale)


class Lora(nn.Module):
    """One adapter over a base model's linear layers, switched on by ``with lora.on(base):``."""

    def __init__(self, layers: dict[str, LoraLayer]) -> None:
        super().__init__()
        self.names = list(layers)
        self.layers = nn.ModuleList(layers.values())

    @classmethod
    def fresh(cls, base: nn.Module, *, targets: list[str], rank: int, alpha: float) -> Lora:
        """A new adapter on every linear layer whose last name is in ``targets``; it changes nothing yet."""
        found = {
            name: LoraLayer(module.in_features, module.out_features, rank, alpha)
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in targets
        }
        if not found:
            raise AdapterMismatch(f"no linear layer named any of {targets} in the base model.")
        return cls(found)

    def by_module(self, base: nn.Module) -> dict[nn.Module, LoraLayer]:
        """Which linear layer of ``base`` each correction belongs to."""
        names = zip(self.names, self.layers, strict=True)
        return {base.get_submodule(name): layer for name, layer in names}  # type: ignore[misc]

    @contextmanager
    def on(self, base: nn.Module, rows: slice = EVERY_ROW, *, under: str = "") -> Iterator[None]:
        """The base with the corrections added, until the block ends.

        Args:
            base: the model.
            rows: the part of the second to last dimension, ``[..., T, in]``, that is corrected.
            under: only layers whose names start so are corrected.
        """
        handles = []
        try:
            for name, layer in zip(self.names, self.layers, strict=True):
                if not name.startswith(under):
                    continue
                hook = _adding(layer, rows)
                handles.append(base.get_submodule(name).register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def save(self, path: Path, *, base_name: str, dtype: torch.dtype | None = None) -> None:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT reads them, as ``dtype`` if given."""
        tensors: dict[str, Tensor] = {}
        sizes: dict[str, tuple[int, float]] = {}
        for name, layer in zip(self.names, self.layers, strict=True):
            assert isinstance(layer, LoraLayer)
            sizes[name] = layer.rank, layer.alpha
            tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = layer.a.detach().to("cpu", dtype).contiguous()
            tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = layer.b.detach().to("cpu", dtype).contiguous()
        save_peft_config(path, sizes, base_name=base_name)
        write_whole(path / "adapter_model.safetensors", save(tensors))

    @classmethod
    def load(cls, path: Path, base: nn.Module) -> Lora:
        """Read a PEFT LoRA directory for ``base``.

        Raises:
            AdapterMismatch: it is no plain LoRA, names layers that the base does not have, or of other sizes.
            ModelNotFound, UnsafeWeights: the file is missing, or not readable safetensors.
        """
        config, tensors = PeftConfig.load(path), read_tensors(path / "adapter_model.safetensors")
        modules = dict(base.named_modules())
        layers: dict[str, LoraLayer] = {}
        for name in dict.fromkeys(key.removeprefix(PEFT_PREFIX).rsplit(".lora_", 1)[0] for key in tensors):
            a = tensors.pop(f"{PEFT_PREFIX}{name}.lora_A.weight", None)
            b = tensors.pop(f"{PEFT_PREFIX}{name}.lora_B.weight", None)
            if a is None or b is None:
                raise AdapterMismatch(f"{path} is no plain LoRA: {name} lacks its lora_A or lora_B matrix.")
            layers[name] = _fitted(name, modules.get(name), a, b, config)
        if tensors:
            more = ", ".join(sorted(tensors)[:3])
            raise AdapterMismatch(f"{path} is no plain LoRA: it has {more} beside its matrices.")
        return cls(layers)


def _fitted(name: str, module: nn.Module | None, a: Tensor, b: Tensor, config: PeftConfig) -> LoraLayer:
    """The layer with the file's matrices, checked against the base's."""
    if module is None:
        raise AdapterMismatch(f"the adapter corrects {name}, which the base model does not have.")
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if not a.dim() == b.dim() == 2:
        raise AdapterMismatch(f"the adapter's {name} has matrices of {a.dim()} and {b.dim()} dimensions.")
    if sizes != (a.shape[1], b.shape[0]):
        raise AdapterMismatch(
            f"the adapter's {name} maps {a.shape[1]} to {b.shape[0]}, the base's {sizes[0]} to {sizes[1]}."
        )
    rank = config.rank_of(name)
    if (a.shape[0], b.shape[1]) != (rank, rank):
        raise AdapterMismatch(
            f"the adapter's {name} has matrices of rank {a.shape[0]} and {b.shape[1]}; its config says {rank}."
        )
    layer = LoraLayer(a.shape[1], b.shape[0], rank, config.alpha_of(name))
    layer.a.data, layer.b.data = a, b
    return layer


def _adding(layer: nn.Module, rows: slice) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if rows == EVERY_ROW:
            corrected: Tensor = output + layer(args[0])
            return corrected
        output[..., rows, :] += layer(args[0][..., rows, :])
        return output

    return hook
