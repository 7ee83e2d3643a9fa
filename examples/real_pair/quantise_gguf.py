"""The pair of ``smollm2_gguf.toml``: ``python -m examples.real_pair.quantise_gguf runs/smollm2_gguf``.

Fetches SmolLM2-135M-Instruct's GGUF file and the questions of the Berkeley Function Calling Leaderboard (as ``make
real`` does), and quantises the file harder with llama.cpp's own quantiser.

    runs/smollm2_gguf/llm.gguf    as it comes: Q4_1, embeddings Q8_0
    runs/smollm2_gguf/slm.gguf    from it: Q2_K as far as that goes
    runs/smollm2_gguf/bfcl        questions, functions, possible answers

Types of 2 and 3 bits need rows of a multiple of 256 weights. SmolLM2's rows have 576, but those of ``ffn_down`` 1,536:
so llama.cpp writes Q3_K there, Q4_0 elsewhere, and leaves the embeddings at Q8_0.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from benchmarks import assets
from s2t_agents.backends.llamacpp.library import complaints, library
from s2t_agents.errors import ConfigError

KIND = "Q2_K"


def quantise(source: Path, target: Path, kind: str = KIND) -> None:
    """Write ``source`` to ``target`` with the mixture of types that llama.cpp calls ``kind``.

    Raises:
        ConfigError: no such kind, or llama.cpp refuses.
    """
    c = library()
    number = getattr(c, f"LLAMA_FTYPE_MOSTLY_{kind}", None)
    if number is None:
        raise ConfigError(f"llama.cpp knows no quantization {kind!r}.", hint="Q2_K, Q3_K_M and Q4_0 are some.")
    wanted = c.llama_model_quantize_default_params()
    wanted.ftype, wanted.allow_requantize = number, True
    with complaints() as said:
        status = c.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(wanted))
    if status:
        target.unlink(missing_ok=True)
        raise ConfigError(f"llama.cpp does not quantise {str(source)!r}: {said[0] if said else status}.")


def main(home: Path) -> None:
    """Everything that ``smollm2_gguf.toml`` names."""
    home.mkdir(parents=True, exist_ok=True)
    files = {"llm.gguf": assets.fetch("smollm2-gguf") / assets.GGUF, "bfcl": assets.fetch("bfcl")}
    for name, file in files.items():
        if not (home / name).exists():
            (home / name).symlink_to(file)
    quantise(home / "llm.gguf", home / "slm.gguf")
    print(f"{home / 'slm.gguf'}: {(home / 'slm.gguf').stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
