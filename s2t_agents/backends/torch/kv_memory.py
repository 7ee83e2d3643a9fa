"""Memory for KV on a CPU: mappings of their own, and those of dropped buffers kept for the next of their size.

    room(keys, 512) ── free mapping of that size? ── yes: its pages are there, nothing to clear
                                                  └─ no: a new one, whose pages come one by one at the first write
    buffer dropped  ── LIMIT_BYTES free already?  ── no: kept    yes: back to the system

KV stays for long among much that does not: in the C library's heap it would keep whole chunks of freed memory from the
system. A page's first write takes longer than to copy its KV, so what was just dropped is used again.
"""

from __future__ import annotations

import math
import mmap
import threading
import weakref
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from ...fork_safety import hold_while_forking

LIMIT_BYTES = 64 * 2**20
"""Memory of dropped buffers that is kept, per process."""

_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}


class FreeMappings:
    """Mappings that no buffer uses. Safe under threads.

    Nobody waits for its lock: garbage collection may end a buffer anywhere, within these blocks too. What finds it
    locked does without.

    Args:
        limit_bytes: never passed.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self._limit, self._nbytes = limit_bytes, 0
        self._by_size: dict[int, list[mmap.mmap]] = {}  # sizes and mappings, the least recently used first
        self._lock = threading.Lock()
        hold_while_forking(self, "_lock")

    def take(self, size: int) -> mmap.mmap:
        """A mapping of so many bytes, with whatever it holds.

        Raises:
            OSError: the system allows no more.
        """
        if self._lock.acquire(blocking=False):
            try:
                found = self._by_size.pop(size, None)
                if found:
                    self._nbytes -= size
                    mapping = found.pop()
                    if found:
                        self._by_size[size] = found
                    return mapping
            finally:
                self._lock.release()
        return mmap.mmap(-1, size, **_PRIVATE)

    def put(self, mapping: mmap.mmap) -> None:
        """Its buffer is gone. Where there are too many, those of the size not used for the longest time go first."""
        if self._lock.acquire(blocking=False):
            try:
                size = len(mapping)
                self._by_size[size] = [*self._by_size.pop(size, ()), mapping]
                self._nbytes += size
                while self._nbytes > self._limit:
                    oldest = next(iter(self._by_size))
                    del self._by_size[oldest][0]
                    self._nbytes -= oldest
                    if not self._by_size[oldest]:
                        del self._by_size[oldest]
            finally:
                self._lock.release()


_free = FreeMappings()


def room(like: Tensor, capacity: int) -> Tensor:
    """An unwritten buffer ``[..., capacity, d]`` for tensors ``[..., T, d]``."""
    shape = (*like.shape[:-2], capacity, like.shape[-1])
    size = math.prod(shape) * like.element_size()
    if like.device.type == "cpu" and size:
        with suppress(OSError):  # as many mappings as the system allows: then the heap, after all
            mapping = _free.take(size)
            array = np.frombuffer(mapping, dtype=np.uint8)
            weakref.finalize(array, _free.put, mapping).atexit = False
            return torch.from_numpy(array).view(like.dtype).view(shape)
    return like.new_empty(shape)
