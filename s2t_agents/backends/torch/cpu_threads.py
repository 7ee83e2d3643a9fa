"""Where forwards run on a CPU, so that OpenMP's teams do not get into each other's way.

libgomp gives every thread that enters a parallel region a team of its own, which stays. Once teams have more threads
than there are cores, it lets all of them sleep between regions instead of spinning, and a forward has hundreds of
regions. So long forwards of a model run on one thread of its own, wherever they are asked for, and a generation's
thread does the rest of a step alone. Short forwards stay where they are asked for: to hand them over would cost more.

Other runtimes and GPUs are left alone.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from weakref import WeakSet

import torch

SOFT = 1
"""``omp_pause_soft``: threads go, settings stay."""

_of_thread = threading.local()


@contextmanager
def serially() -> Iterator[None]:
    """This thread's operations run on it alone, forwards aside."""
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
def together(threads: int) -> Iterator[None]:
    """This thread's operations run on so many threads."""
    library, before = _libgomp(), torch.get_num_threads()
    if library is None or threads == before:
        yield
        return
    library.omp_set_num_threads(threads)
    try:
        yield
    finally:
        library.omp_set_num_threads(before)


def wanted() -> int:
    """Threads that the caller's operations run on, ``serially`` aside."""
    return getattr(_of_thread, "team", None) or torch.get_num_threads()


def release() -> None:
    """Give back the team of this thread, if it has one; the next parallel region makes another."""
    library = _libgomp()
    if library is not None:
        library.omp_pause_resource_all(SOFT)


_teams: WeakSet[Team] = WeakSet()


class Team:
    """Runs the forwards of one model, and keeps a thread for the long ones."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        _teams.add(self)

    def here(self, forward: Callable[[], None]) -> None:
        """On the calling thread, with all its threads."""
        with together(wanted()):
            forward()

    def apart(self, forward: Callable[[], None]) -> None:
        """On the thread of this team; returns when it is done, even if the caller is interrupted before.

        Raises:
            Exception: what ``forward`` raises.
        """
        if _libgomp() is None:
            return forward()
        if self._thread is None:
            thread = ThreadPoolExecutor(1, thread_name_prefix="s2t-forward")
            thread.submit(int).result()  # an interrupt while it starts would leave a second one
            self._thread = thread
        release()  # the caller's own, if it has computed something itself
        try:
            self._thread.submit(self._led, forward, wanted()).result()
        except BaseException:
            self._thread.submit(int).result()  # after what is running: nobody reads KV that is being written
            raise
        return None

    def pause(self) -> None:
        """Nobody needs it for now: other people's operations get the cores to themselves."""
        if self._thread is not None:
            with suppress(RuntimeError):  # the interpreter is ending, and the thread with it
                self._thread.submit(release)

    def rest(self) -> None:
        """The thread goes, until it is needed again."""
        if self._thread is not None:
            self._thread.shutdown(wait=False)
            self._thread = None

    @staticmethod
    def _led(forward: Callable[[], None], threads: int) -> None:
        with together(threads):
            forward()


def _forget_threads() -> None:
    for team in _teams:
        team._thread = None  # it did not come along into the child


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=release, after_in_child=_forget_threads)


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
