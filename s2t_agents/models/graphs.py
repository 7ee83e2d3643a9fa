"""Work of fixed shapes at fixed addresses, recorded once and played again: on CUDA as a captured graph.

A body takes nothing and gives tensors: what it reads and writes was put into static buffers before.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

Body = Callable[[], tuple[Tensor, ...]]
"""Work over static buffers. Its results may lie in the same memory every time: copy what is to be kept."""

Recorder = Callable[[Body], Body]
"""Makes a body that does the same again. The first call of the body may happen while it is recorded."""


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
                body()  # libraries choose and compile their kernels, and allocate their workspaces
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on allocating and copying meanwhile; only this one's mistakes count.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = body()

        return Replay(graph, outputs)


class Replay:
    """A captured body.

    Args:
        graph: as captured.
        outputs: where it leaves its results.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: tuple[Tensor, ...]) -> None:
        self._graph, self._outputs = graph, outputs

    def __call__(self) -> tuple[Tensor, ...]:
        """Begin it; the device may be at it for a while yet."""
        self._graph.replay()
        return self._outputs

    def __del__(self) -> None:
        with suppress(Exception):  # at the end of the interpreter there is nothing left to wait for
            torch.cuda.synchronize()  # a graph must not go while it is played
