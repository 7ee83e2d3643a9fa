"""Short hashes that tell whether two tokenizers, or two sets of weights, are the same thing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

PROBES = 4096
"""How many values of the input embedding the weights' fingerprint reads."""

LAYER_PROBES = 16
"""And of every other parameter."""


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of what ids mean: the vocabulary and the added tokens. Template and settings do not count."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return _short(json.dumps(vocabulary, ensure_ascii=True))


def shared_ids(ours: Any, theirs: Any) -> list[str]:
    """Tokens of ``ours`` whose id means something else, or nothing, in ``theirs``; empty when ours fits in theirs."""
    other = theirs.get_vocab()
    return [token for token, token_id in ours.get_vocab().items() if other.get(token) != token_id]


def weights_fingerprint(model: nn.Module) -> str:
    """``EMBEDDING/LAYERS``: hashes of a few values of the input embedding, and of every other parameter.

    The second part is missing where the layers cannot be read as they were saved: quantised, or offloaded.
    """
    embedding: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    first = embedding_fingerprint(embedding)
    others = [parameter for parameter in model.parameters() if parameter is not embedding]
    if getattr(model.config, "quantization_config", None) or any(map(_unreadable, others)):
        return first
    found = sorted(f"{tuple(each.shape)}{_steady(_probes(each, LAYER_PROBES)).tolist()}" for each in others)
    return f"{first}/{_short(str(found))}"


def checkpoint_fingerprint(norms: Iterable[Tensor]) -> str | None:
    """Hash of a model's normalisation weights ``[H]`` each, in any order; None where all of them are constant.

    Files of every engine and quantization keep these as they were trained, so that it tells one checkpoint from
    another whatever became of its matrices. An adapter that was merged into the matrices does not show in it.
    """
    whole = (norm.detach().flatten().to("cpu", torch.float32) for norm in norms)
    # llama.cpp's converter adds 1 to those of some families: what fp32 loses by that is left out everywhere
    rounded = ((each + 1 - 1).bfloat16().float() for each in whole)
    found = sorted(str(_steady(each).tolist()) for each in rounded if each.numel() and bool((each != each[0]).any()))
    return _short(str(found)) if found else None


def tensors_fingerprint(tensors: Iterable[Tensor]) -> str:
    """Hash of all values of a few small tensors, such as a selector's."""
    digest = hashlib.sha256()
    for each in tensors:
        values = each.detach().cpu().contiguous()
        digest.update(f"{values.dtype}{tuple(values.shape)}".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def module_fingerprint(module: nn.Module) -> str:
    """Hash of a small module: its architecture with the settings that its ``repr`` tells, and all values."""
    return _short(nn.Module.__repr__(module) + tensors_fingerprint(module.state_dict().values()))


def norms_of(model: nn.Module) -> list[Tensor]:
    """The weights ``[H]`` of a model's normalisation layers, told by their name or their class (GPT-2's ``ln_1``)."""
    layers = [
        module
        for name, module in model.named_modules()
        if name.endswith("norm") or "norm" in type(module).__name__.lower()
    ]
    weights = [getattr(layer, "weight", None) for layer in layers]
    return [each for each in weights if isinstance(each, Tensor) and each.dim() == 1 and not each.is_meta]


def embedding_fingerprint(embedding: Tensor) -> str:
    """The first part of ``weights_fingerprint``, from the input embedding ``[V, H]``."""
    return _short(str((embedding.numel(),)) + str(_probes(embedding, PROBES).view(torch.int16).tolist()))


def same_weights(one: str, other: str) -> bool:
    """Whether two fingerprints may be of the same weights: a part that only one of them has does not tell."""
    return all(mine == theirs for mine, theirs in zip(one.split("/"), other.split("/"), strict=False))


def _probes(weights: Tensor, count: int) -> Tensor:
    """Evenly spaced values, rounded to bf16 so that the loading dtype does not count."""
    values = weights.detach().flatten()
    at = torch.linspace(0, values.numel() - 1, min(count, values.numel()), dtype=torch.float64).long()
    return values[at.to(values.device)].to("cpu", torch.bfloat16)


def _steady(values: Tensor) -> Tensor:
    """Without the values that fp16 cannot hold exactly."""
    return values.where(values.abs() >= torch.finfo(torch.float16).tiny, 0)


def _unreadable(parameter: Tensor) -> bool:
    return parameter.is_meta or parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
