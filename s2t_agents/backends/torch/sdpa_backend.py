"""Attention without cuDNN: it plans anew for every length, in every thread, and a prompt's length is always new.

Before this was here, a generation's first token took 55 ms more in a new thread than in one that had read such a prompt
before, on an H100 (benchmarks/results/gpu.json, 1 at once); that these plans were the cause is inferred. torch's other
kernels need no plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_cudnn_attention(device: torch.device) -> Iterator[None]:
    """Inside the block torch takes no attention kernel of cuDNN's; a setting of the process, restored at the end."""
    before = bool(torch.backends.cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call]
    if device.type != "cuda" or not before:
        yield
        return
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
