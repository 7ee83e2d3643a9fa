"""What limits a token on a device: the weights are read once for each, at the speed of its memory."""

from __future__ import annotations

import time
from typing import Any

import torch

from s2t_agents.scheduling.language_model import LanguageModel

NOMINAL_GB_S = {
    "H200": 4800.0,
    "H100 PCIe": 2000.0,
    "H100 NVL": 3900.0,
    "H100": 3350.0,
    "A100-SXM4-80GB": 2039.0,
    "A100": 1555.0,
    "L40S": 864.0,
    "L4": 300.0,
    "A10G": 600.0,
    "T4": 320.0,
    "RTX 4090": 1008.0,
    "RTX 3090": 936.0,
}
"""Memory bandwidth that the makers state, by a part of the device's name; the first that fits counts."""

COPIES = 10


def described(device: torch.device, megabytes: int) -> dict[str, Any]:
    """Name, versions and bandwidth of a device.

    Args:
        device: a CUDA device or the CPU.
        megabytes: of the block whose copying is timed.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "device": name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "copy_gb_s": copy_gb_s(device, megabytes),
        "nominal_gb_s": next((speed for part, speed in NOMINAL_GB_S.items() if part in name), None),
    }


def copy_gb_s(device: torch.device, megabytes: int) -> float:
    """Bytes read and written per second when a block is copied on the device, in GB/s: the best of a few."""
    source = torch.ones(megabytes * 2**20, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(COPIES):
        _wait(device)
        started = time.perf_counter()
        target.copy_(source)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * source.nbytes / best / 1e9


def bytes_per_token(model: LanguageModel) -> int:
    """Bytes of all weights that a step reads: layers, last norm and output layer."""
    embedding = model.model.get_input_embeddings().weight
    layers = sum(weight.nbytes for weight in model.torch_backend.decoder.parameters() if weight is not embedding)
    return int(layers + model.output_embedding.nbytes)


def share_of_limit(model: LanguageModel, ms_per_token: float, about: dict[str, Any]) -> dict[str, Any]:
    """Time that reading the weights takes at least, as a share of a token's time.

    Args:
        model: whose weights are read.
        ms_per_token: what a token takes.
        about: see ``described``.

    Returns:
        The share by measured and by nominal bandwidth; None where that is unknown.
    """
    size = bytes_per_token(model)
    shares = {
        f"share_of_{kind}": size / (speed * 1e9) / (ms_per_token / 1e3) if speed else None
        for kind, speed in (("copy", about["copy_gb_s"]), ("nominal", about["nominal_gb_s"]))
    }
    return {"weight_bytes": size, "ms_per_token": ms_per_token, **shares}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
