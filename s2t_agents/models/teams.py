"""OpenMP teams, on a CPU: one at a time, and never kept where nobody computes.

libgomp gives every thread that enters a parallel region a team of its own, which stays. Once teams have more threads
than there are cores, it lets all of them sleep between regions instead of spinning, and a forward has hundreds of
regions: with eight generations in threads of their own on two cores it took 1.4 times as long. So a generation's thread
has a team only while it runs a forward, and gives it back when the next forward may be another thread's.

Other runtimes and GPUs are left alone.
"""

from __future__ import annotations

import ctypes
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
def serially() -> Iterator[None]:
    """This thread's operations run on it alone, but for those inside ``together``."""
    library = _libgomp()
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
def together() -> Iterator[None]:
    """Inside ``serially``: operations run on as many threads as before it."""
    library, threads = _libgomp(), getattr(_of_thread, "team", None)
    if library is None or threads is None:
        yield
        return
    library.omp_set_num_threads(threads)
    try:
        yield
    finally:
        library.omp_set_num_threads(1)


def release() -> None:
    """Give back the team of this thread, if it has one; the next parallel region makes another."""
    library = _libgomp()
    if library is not None:
        library.omp_pause_resource_all(SOFT)


@cache
def _libgomp() -> ctypes.CDLL | None:
    """The OpenMP runtime that torch brought along, if it is GNU's and can give teams back."""
    home = Path(torch.__file__).parent
    for path in sorted([*home.glob("lib/libgomp*.so*"), *home.parent.glob("torch.libs/libgomp*.so*")]):
        try:
            library = ctypes.CDLL(str(path), mode=ctypes.RTLD_LOCAL)
        except OSError:
            continue
        if hasattr(library, "omp_pause_resource_all"):
            return library
    return None
