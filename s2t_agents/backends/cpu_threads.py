"""OpenMP threads of forwards on a CPU: as many as the caller's setting for the forward, one for the rest of a step.

libgomp gives every thread that enters a parallel region a team of threads of its own, which stays. Once the teams have
more threads than there are cores, it lets all of them sleep between regions instead of spinning, and a forward has
hundreds of regions. So long forwards of a model run in the scheduler's thread, with one team, and a generation's own
thread does the rest of a step without one.

Other OpenMP runtimes, and GPUs, are left alone.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

SOFT = 1
"""``omp_pause_soft``: threads go, settings stay."""

_of_thread = threading.local()


@contextmanager
def single_threaded() -> Iterator[None]:
    """This thread's operations run on it alone, forwards aside."""
    library = libgomp()
    threads = torch.get_num_threads()
    if library is None or threads == 1:
        yield
        return
    library.omp_set_num_threads(1)
    _of_thread.team = threads
    try:
        yield
    finally:
        del _of_thread.team
        library.omp_set_num_threads(threads)


@contextmanager
def with_threads(threads: int) -> Iterator[None]:
    """This thread's operations run on so many threads."""
    library, before = libgomp(), torch.get_num_threads()
    if library is None or threads == before:
        yield
        return
    library.omp_set_num_threads(threads)
    try:
        yield
    finally:
        library.omp_set_num_threads(before)


def wanted_threads() -> int:
    """Threads that the caller's operations run on, ``single_threaded`` aside."""
    return getattr(_of_thread, "team", None) or torch.get_num_threads()


def release_threads() -> None:
    """Give back the team of this thread, if it has one; the next parallel region makes another."""
    library = libgomp()
    if library is not None:
        library.omp_pause_resource_all(SOFT)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=release_threads)


@cache
def libgomp() -> ctypes.CDLL | None:
    """The OpenMP runtime that torch brought along, if it is GNU's and can give teams back."""
    home = Path(torch.__file__).parent
    for path in sorted([*home.glob("lib/libgomp*.so*"), *home.parent.glob("torch.libs/libgomp*.so*")]):
        try:
            library = ctypes.PyDLL(str(path), mode=ctypes.RTLD_LOCAL)  # so short that handing the GIL over costs more
        except OSError:
            continue
        if hasattr(library, "omp_pause_resource_all"):
            return library
    return None
