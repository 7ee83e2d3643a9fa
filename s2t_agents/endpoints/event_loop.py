"""An event loop in a background thread, so that blocking callers get network I/O with a total deadline.

Blocking sockets have a timeout per read, which a server that sends single bytes never exceeds. A coroutine under
``asyncio.timeout`` is cancelled in any state: name resolution, handshake, headers or body.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

from ..errors import EscalationFailed

T = TypeVar("T")

GRACE_S = 1.0
"""Seconds beyond the coroutine's deadline to wait for the loop, in case it is blocked or starved."""

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def shared_loop() -> asyncio.AbstractEventLoop:
    """This process's background loop; its thread starts at the first call."""
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="s2t-network", daemon=True).start()
        return _loop


def run_coroutine(
    coroutine: Coroutine[Any, Any, T], seconds: float, timeout_error: type[EscalationFailed] = EscalationFailed
) -> T:
    """Run a coroutine on ``shared_loop`` and wait for it. An interrupted wait cancels it.

    Args:
        coroutine: to run.
        seconds: deadline.
        timeout_error: class of the error at the deadline.

    Raises:
        EscalationFailed: ``timeout_error``, and what the coroutine raises.
    """
    future = asyncio.run_coroutine_threadsafe(_with_timeout(coroutine, seconds), shared_loop())
    try:
        return future.result(seconds + GRACE_S)
    except FutureTimeout:
        future.cancel()
        raise timeout_error(f"no answer within {seconds:.3g} s.") from None
    except BaseException:
        future.cancel()
        raise


async def _with_timeout(coroutine: Coroutine[Any, Any, T], seconds: float) -> T:
    async with asyncio.timeout(seconds):
        return await coroutine


def _reset_after_fork() -> None:
    global _loop, _lock
    _loop, _lock = None, threading.Lock()  # the child has no such thread


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)
