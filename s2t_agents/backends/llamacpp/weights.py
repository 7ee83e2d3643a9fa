"""Weights of a GGUF file as the checkpoint has them: dequantised, and without what llama.cpp's converter adds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError
from .gguf_header import GGUFHeader, TensorInfo

CENTRED_AT_ONE = frozenset(
    {
        "gemma", "gemma2", "gemma3", "gemma-embedding", "nemotron", "qwen3next", "qwen35", "qwen35moe", "step35",
    }
)  # fmt: skip
"""Architectures whose checkpoints store a normalisation weight less 1; the converter adds it. Gemma 3n and 4 do not."""

GATED_NORM = "ssm_norm.weight"
"""That of Qwen's linear attention is stored as it is, beside others that are not."""

_BLOCK = re.compile(r"blk\.(\d+)\.")


def checkpoint_norms(header: GGUFHeader) -> Iterator[Tensor]:
    """The normalisation weights ``[H]``, as the checkpoint has them.

    The blocks that predict tokens after the next one are left out: PyTorch does not load them.
    """
    architecture = header.architecture
    blocks = header.number(f"{architecture}.block_count") or 0
    blocks -= header.number(f"{architecture}.nextn_predict_layers") or 0
    for name, (path, info) in header.tensors.items():
        block = _BLOCK.match(name)
        if len(info.shape) > 1 or not name.endswith("norm.weight") or (block and int(block[1]) >= blocks):
            continue
        added = 1 if architecture in CENTRED_AT_ONE and not name.endswith(GATED_NORM) else 0
        yield dequantised(path, info)[0] - added


def dequantised(path: Path, info: TensorInfo) -> Tensor:
    """A tensor of a GGUF file as a matrix ``[rows, columns]``: fp16, or fp32 where the file has that of one row.

    Raises:
        ConfigError: a type that the package gguf cannot dequantise.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    columns, rows = info.shape[0], prod(info.shape[1:])
    raw = np.memmap(path, dtype=np.uint8, mode="r", offset=info.offset, shape=(rows, info.nbytes // rows))
    kind = GGMLQuantizationType(info.kind)
    whole = torch.empty(rows, columns, dtype=torch.float32 if rows == 1 else torch.float16)
    try:
        for at in range(0, rows, 4096):  # fp32 takes several times the space
            part = raw[at : at + 4096]
            values = part.view(np.float32) if kind == GGMLQuantizationType.F32 else dequantize(part, kind)
            whole[at : at + 4096] = torch.from_numpy(np.array(values, dtype=np.float32))
    except NotImplementedError as error:
        raise ConfigError(
            f"the package gguf cannot read weights of the type {kind.name}.", hint="Upgrade it."
        ) from error
    return whole
