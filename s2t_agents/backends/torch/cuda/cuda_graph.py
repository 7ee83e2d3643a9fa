"""Work of fixed shapes at fixed addresses, recorded once and played again: on CUDA as a captured graph.

A body takes nothing and gives tensors: what it reads and writes was put into static buffers before.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

Body = Callable[[], tuple[Tensor, ...]]
"""Work over static buffers. Its results may lie in the same memory every time: copy what is to be kept."""

Recorder = Callable[[Body], Body]
"""Makes a body that does the same again. The first call of the body may happen while it is recorded."""

CAPTURING = threading.Lock()
"""Held while a body is warmed up and captured: a process can be at one capture at a time, and a wait for the whole
device, as in a warm-up, breaks it off."""


def played(body: Body) -> Body:
    """No recording: the body itself, wherever graphs do not exist."""
    return body


RETRY_S = 60.0
"""Seconds for which nothing is captured once the device's memory was out; others may have given some back by then."""


def out_of_memory(error: RuntimeError) -> bool:
    """Whether there was no memory: libraries and drivers say so in words only."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside the block no garbage is collected: what a finaliser does on the device would end up in a capture."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class CudaGraphs:
    """Captures bodies as CUDA graphs that share one pool of memory.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._latest: torch.cuda.CUDAGraph | None = None
        """Kept, since a pool is gone for good once no graph is left that was captured in it."""

    def __call__(self, body: Body) -> Body:
        """Warm up on a side stream, capture, and give the replay.

        Raises:
            RuntimeError: the body does something that cannot be captured.
            torch.OutOfMemoryError: there is no memory for it now.
        """
        with CAPTURING, torch.cuda.device(self._device):
            here = torch.cuda.current_stream()
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(here)
            with torch.cuda.stream(side):
                body()  # libraries choose and compile their kernels, and allocate their workspaces
            here.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on allocating and copying meanwhile; only this one's mistakes count.
            capture = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
            with torch.cuda.stream(here), uncollected(), capture:  # a capture that fails leaves its stream current
                outputs = body()
        self._latest = graph
        return Replay(graph, outputs, self._device)


class Replay:
    """A captured body.

    Args:
        graph: as captured.
        outputs: where it leaves its results.
        device: the CUDA device that plays it.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: tuple[Tensor, ...], device: torch.device) -> None:
        self._graph, self._outputs, self._device = graph, outputs, device
        self._stream: torch.cuda.Stream | None = None

    def __call__(self) -> tuple[Tensor, ...]:
        """Begin it; the device may be at it for a while yet."""
        self._stream = torch.cuda.current_stream(self._device)
        self._graph.replay()
        return self._outputs

    def __del__(self) -> None:
        with suppress(Exception):  # at the end of the interpreter there is nothing left to wait for
            if self._stream is not None:
                self._stream.synchronize()  # a graph must not go while it is played
