"""Peak resident memory of one engine: a process of its own reads a prompt, answers, and prints MB."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path


def main(engine: str, path: str, length: int) -> float:
    """MB; ``engine`` is a row of ``engines``."""
    prompt, tokens = [10 + at % 200 for at in range(length)], 8
    if engine == "llama.cpp":
        from .bare_llama import BareLlama

        threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
        bare = BareLlama(Path(path), sequences=1, cells=length + tokens, threads=threads)
        bare.read([prompt])
        bare.run(1, tokens)
    else:
        import torch

        from s2t_agents.engine.engine import Engine
        from s2t_agents.scheduling.language_model import LanguageModel
        from s2t_agents.types import Sampling

        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(engine.split()[-1])
        model = LanguageModel.load(path, dtype=dtype)
        list(Engine(model).steps(prompt, Sampling(max_tokens=tokens)))
    return peak_mb()


def peak_mb() -> float:
    """Of this process since its program began; ``ru_maxrss`` would begin with its parent's (Linux)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
