"""Memory of KV buffers on a CPU: each is a mapping of its own; that of a dropped buffer is reused for the next one.

    room(keys, 512) ── a recent buffer of that size that nothing reads any more? ── yes: its pages are there
                                                                                 └─ no: a new mapping

KV stays for long among much that does not: in the C library's heap it would keep whole chunks of freed memory from the
system. But the first write to a new page (a page fault) costs more than copying the KV in it, so mappings that were
made lately are reused once nothing reads them. Older ones go back to the system as soon as they are dropped.

No lock and no finalizer, so that a signal handler may raise anywhere: each change is one operation of a deque or dict.
"""

from __future__ import annotations

import math
import mmap
from collections import deque
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

SIZES = 4
"""Buffer sizes whose mappings are reused: those asked for last."""

SIZE_BYTES = 16 * 2**20
"""Bytes of mappings per size that are remembered, and so stay allocated although they are dropped."""

LOOKS = 4
"""Remembered mappings that are tried, the newest first; one in use becomes the oldest."""

_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}


class _Buffer(NamedTuple):
    """A mapping, and the storage of all tensors over it."""

    mapping: mmap.mmap
    storage: StorageWeakRef


_recent: dict[int, deque[_Buffer]] = {}
"""By size in bytes, the size asked for last at the end."""


def room(like: Tensor, capacity: int) -> Tensor:
    """An unwritten buffer ``[..., capacity, d]`` for tensors ``[..., T, d]``."""
    shape = (*like.shape[:-2], capacity, like.shape[-1])
    size = math.prod(shape) * like.element_size()
    if like.device.type == "cpu" and size:
        with suppress(OSError):  # as many mappings as the system allows: then the heap, after all
            return _buffer(size).view(like.dtype).view(shape)
    return like.new_empty(shape)


def _buffer(size: int) -> Tensor:
    """``[size]`` bytes.

    Raises:
        OSError: the system allows no more mappings.
    """
    recent = _recent[size] = _recent.pop(size, deque(maxlen=SIZE_BYTES // size))
    for old in list(_recent)[:-SIZES]:
        _recent.pop(old, None)
    mapping = _unused(recent) or mmap.mmap(-1, size, **_PRIVATE)
    buffer = torch.frombuffer(mapping, dtype=torch.uint8)
    recent.append(_Buffer(mapping, StorageWeakRef(buffer.untyped_storage())))  # type: ignore[no-untyped-call]
    return buffer


def _unused(recent: deque[_Buffer]) -> mmap.mmap | None:
    """A mapping that no tensor lies in any more, taken from the recent ones; None where none is found."""
    for _ in range(min(LOOKS, len(recent))):
        try:
            newest = recent.pop()
        except IndexError:  # another thread took it
            return None
        if newest.storage.expired():  # type: ignore[no-untyped-call]
            return newest.mapping
        recent.appendleft(newest)
    return None
