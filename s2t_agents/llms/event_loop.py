"""An event loop in a thread of its own: blocking callers get network work with a deadline that nothing outlasts.

Blocking sockets have a timeout per read, so a server that sends a byte now and then is never late. A coroutine under
``asyncio.timeout`` is cancelled whatever it waits for: name resolution, handshake, headers or body.
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
"""Beyond the work's own deadline; only a loop that is stuck or starved is ever this late."""

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def running_loop() -> asyncio.AbstractEventLoop:
    """This process's loop; its thread starts with the first call."""
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="s2t-network", daemon=True).start()
        return _loop


def run(work: Coroutine[Any, Any, T], seconds: float, late: type[EscalationFailed] = EscalationFailed) -> T:
    """Do the work there and wait for it. An interrupted wait cancels the work.

    Args:
        work: awaited on ``running_loop``.
        seconds: it may take.
        late: the error where it takes longer.

    Raises:
        EscalationFailed: ``late``, and what the work raises.
    """
    future = asyncio.run_coroutine_threadsafe(_within(work, seconds), running_loop())
    try:
        return future.result(seconds + GRACE_S)
    except FutureTimeout:
        future.cancel()
        raise late(f"no answer within {seconds:.3g} s.") from None
    except BaseException:
        future.cancel()
        raise


async def _within(work: Coroutine[Any, Any, T], seconds: float) -> T:
    async with asyncio.timeout(seconds):
        return await work


def _forget_loop() -> None:
    global _loop, _lock
    _loop, _lock = None, threading.Lock()  # the thread did not come along into the child


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_loop)
