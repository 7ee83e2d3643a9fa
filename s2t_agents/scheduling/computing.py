"""What callers' threads compute between forwards, and how it ends with the interpreter.

While Python finalizes, a daemon thread ends where it next acquires the GIL. Below C++ frames that is
``std::terminate``, and torch releases the GIL in every operation: at interpreter exit no daemon thread may be in one.
"""

from __future__ import annotations

import sys
import threading
import time
from contextlib import ContextDecorator

COMPUTING_EXIT_S = 5.0
"""How long the end of the interpreter waits for what is computed between two forwards, in seconds.

An LLM that is asked at that moment has so long to answer.
"""

POLL_S = 0.001


class Computing(ContextDecorator):
    """Context manager and decorator, reentrant: this thread computes. At interpreter exit, others block."""

    def __init__(self) -> None:
        self._depths: dict[int, int] = {}
        """By thread; each changes its own only, a dictionary's operations are atomic under the GIL."""
        self._exiting: int | None = None
        self._never = threading.Lock()

    def __enter__(self) -> None:
        thread = threading.get_ident()
        depth = self._depths.get(thread, 0)
        self._depths[thread] = depth + 1
        if self._exiting is not None and not depth and thread != self._exiting:
            del self._depths[thread]
            self._never.acquire()

    def __exit__(self, *exc: object) -> None:
        thread = threading.get_ident()
        depth = self._depths[thread] - 1
        if depth:
            self._depths[thread] = depth
        else:
            del self._depths[thread]

    def stop_others(self) -> None:
        """For interpreter exit: only this thread may compute now; wait for others, ``COMPUTING_EXIT_S`` at most."""
        self._never.acquire(blocking=False)
        self._exiting = threading.get_ident()
        until = time.monotonic() + COMPUTING_EXIT_S
        while self._others() and time.monotonic() < until:
            time.sleep(POLL_S)

    def _others(self) -> bool:
        alive = sys._current_frames().keys()  # threads of a process that forked this one are not
        return any(thread in alive for thread in list(self._depths) if thread != self._exiting)


computing = Computing()
"""Entered by the drivers of ``scheduling.waits``; forwards that they wait for are the scheduler's."""
