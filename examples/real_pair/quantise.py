"""The pair of ``smollm2.toml``: ``python -m examples.real_pair.quantise runs/smollm2``, from the repository's root.

Fetches SmolLM2-135M-Instruct and the questions of the Berkeley Function Calling Leaderboard (as ``make real`` does) and
makes the small model of the same weights: MLP 3 bits in groups of 16, attention 4 bits in groups of 64, by HQQ.

    runs/smollm2/llm     the weights as they come, fp32
    runs/smollm2/slm     the quantised weights as plain numbers: as fast as any fp32 checkpoint on a CPU, same answers
    runs/smollm2/bfcl    questions, functions, possible answers

``quantise`` works on any Llama-like checkpoint folder, so a larger pair is the same with other names.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import assets

MLP, ATTENTION = (3, 16), (4, 64)  # bits, group

THREADS = 2
"""Of HQQ's sums: with another number, 748 of 106 million weights are rounded to others."""


@dataclass
class Memory:
    """Bytes of the weights: ``packed`` as HQQ stores them (scales and zeros in 16 bits), ``half`` all in 16 bits."""

    packed: int = 0
    half: int = 0

    def __str__(self) -> str:
        return f"{self.packed / 1e6:.0f} MB packed, {self.half / 1e6:.0f} MB in 16 bits"


def quantise(source: Path, target: Path) -> Memory:
    """Write ``source`` with quantised linear layers to ``target``, as plain fp32; returns what they take packed."""
    from hqq.core.quantize import Quantizer
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    memory = Memory()
    for name, weights in model.named_parameters():
        memory.half += 2 * weights.numel()
        if weights.ndim != 2 or ".layers." not in name:
            memory.packed += 2 * weights.numel()
            continue
        bits, group = MLP if ".mlp." in name else ATTENTION
        packed, meta = Quantizer.quantize(
            weights.data, nbits=bits, group_size=group, axis=1, device="cpu", compute_dtype=torch.float32
        )
        memory.packed += packed.nbytes + 2 * (meta["scale"].numel() + meta["zero"].numel())
        weights.data.copy_(Quantizer.dequantize(packed, meta).reshape(weights.shape))
    model.save_pretrained(target)
    for file in source.iterdir():
        if file.is_file() and not (target / file.name).exists() and file.suffix in (".json", ".jinja"):
            shutil.copy(file, target / file.name)
    return memory


def main(home: Path) -> None:
    """Everything that ``smollm2.toml`` names."""
    home.mkdir(parents=True, exist_ok=True)
    for name, asset in (("llm", "smollm2"), ("bfcl", "bfcl")):
        if not (home / name).exists():
            (home / name).symlink_to(assets.fetch(asset), target_is_directory=True)
    print(f"{home / 'slm'}: {quantise(home / 'llm', home / 'slm')}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
