"""Work of fixed shapes at fixed addresses, recorded once and played again: on CUDA as a captured graph.

A body takes nothing and gives tensors: what it reads and writes was put into static buffers before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Body = Callable[[], tuple[Tensor, ...]]
"""Work over static buffers. Its results may lie in the same memory every time: copy what is to be kept."""

Recorder = Callable[[Body], Body]
"""Makes a body that does the same again. The first call of the body may happen while it is recorded."""

WARM_UPS = 3
"""Runs before a capture: libraries choose their kernels and allocate their workspaces in them."""


def played(body: Body) -> Body:
    """No recording: the body itself, wherever graphs do not exist."""
    return body


class CudaGraphs:
    """Captures bodies as CUDA graphs that share one pool of memory.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, body: Body) -> Body:
        """Warm up on a side stream, capture, and give the replay.

        Raises:
            RuntimeError: the body does something that can not be captured, or memory is out.
        """
        with torch.cuda.device(self._device):
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    body()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on allocating and copying meanwhile; only this one's mistakes count.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = body()

        def again() -> tuple[Tensor, ...]:
            graph.replay()
            return outputs

        return again
