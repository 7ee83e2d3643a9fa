"""Low-rank corrections that exist only inside a ``with`` block; outside it the base model is untouched.

Forward hooks are put on when the block is entered and taken off when it is left: a plain step of the base runs
without a single extra instruction, so its logits and KV stay bitwise its own. (PEFT's ``disable_adapter`` costs
32 ms on 28 layers, ours well under one.) Files on disk are PEFT's.
"""

from __future__ import annotations

import json
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

PEFT_PREFIX = "base_model.model."
EVERY_ROW = slice(None)


class LoraLayer(nn.Module):
    """``x -> x A^T B^T * scale`` with A ``[r, in]``, B ``[out, r]``; B starts at zero, so it starts as nothing."""

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, in_features))
        self.b = nn.Parameter(torch.zeros(out_features, rank))
        self.scale = scale
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

    def __init__(self, layers: dict[str, LoraLayer], rank: int, alpha: float) -> None:
        super().__init__()
        self.names = list(layers)
        self.layers = nn.ModuleList(layers.values())
        self.rank, self.alpha = rank, alpha

    @classmethod
    def fresh(cls, base: nn.Module, *, targets: list[str], rank: int, alpha: float) -> Lora:
        """A new adapter on every linear layer whose last name is in ``targets``; it changes nothing yet."""
        found = {
            name: LoraLayer(module.in_features, module.out_features, rank, alpha / rank)
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in targets
        }
        if not found:
            raise AdapterMismatch(f"no linear layer named any of {targets} in the base model.")
        return cls(found, rank, alpha)

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
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_name,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted({name.rsplit(".", 1)[-1] for name in self.names}),
            "inference_mode": True,
        }
        write_whole(path / "adapter_config.json", (json.dumps(config, indent=2) + "\n").encode())
        tensors: dict[str, Tensor] = {}
        for name, layer in zip(self.names, self.layers, strict=True):
            assert isinstance(layer, LoraLayer)
            tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = layer.a.detach().to("cpu", dtype).contiguous()
            tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = layer.b.detach().to("cpu", dtype).contiguous()
        write_whole(path / "adapter_model.safetensors", save(tensors))

    @classmethod
    def load(cls, path: Path, base: nn.Module) -> Lora:
        """Read a PEFT LoRA directory for ``base``.

        Raises:
            AdapterMismatch: it names layers that the base does not have, or of other sizes.
            ModelNotFound, UnsafeWeights: the file is missing, or not readable safetensors.
        """
        config = json.loads((path / "adapter_config.json").read_text())
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        tensors = read_tensors(path / "adapter_model.safetensors")
        modules = dict(base.named_modules())
        layers: dict[str, LoraLayer] = {}
        for name in dict.fromkeys(key.removeprefix(PEFT_PREFIX).rsplit(".lora_", 1)[0] for key in tensors):
            a = tensors.get(f"{PEFT_PREFIX}{name}.lora_A.weight")
            b = tensors.get(f"{PEFT_PREFIX}{name}.lora_B.weight")
            if a is None or b is None:
                raise AdapterMismatch(f"{path} is no plain LoRA: {name} lacks its lora_A or lora_B matrix.")
            layers[name] = _fitted(name, modules.get(name), a, b, scale)
        return cls(layers, rank, alpha)


def _fitted(name: str, module: nn.Module | None, a: Tensor, b: Tensor, scale: float) -> LoraLayer:
    """The layer with the file's matrices, checked against the base's."""
    if module is None:
        raise AdapterMismatch(f"the adapter corrects {name}, which the base model does not have.")
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if sizes != (a.shape[1], b.shape[0]):
        raise AdapterMismatch(
            f"the adapter's {name} maps {a.shape[1]} to {b.shape[0]}, the base's {sizes[0]} to {sizes[1]}."
        )
    layer = LoraLayer(a.shape[1], b.shape[0], a.shape[0], scale)
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
