"""``os.fork()`` while other threads work: the child gets every lock free and what it guards whole.

A fork waits until the forwards, loadings and changes under way in other threads are done, as Python's ``logging`` does
it, and then lets them go on, in the parent. Their generations do not exist in the child.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from functools import cached_property
from typing import Any

PATIENCE_S = 60.0
"""How long a fork waits in all, for a model that is being loaded say; what is not free then is made anew, as it is."""

LOADING, FORWARD, BRIEF = 0, 1, 2
"""In which order locks are taken: as those who hold several take them."""

_locks: list[tuple[int, weakref.ref[Any], str]] = []
_renewals: list[weakref.WeakMethod[Callable[[], None]]] = []


class _Held(threading.local):
    """What the thread that forks holds meanwhile: several may fork at once, and each needs every lock itself."""

    def __init__(self) -> None:
        self.taken: list[Any] = []
        self.stuck: list[Any] = []
        self.stopped = False


_held = _Held()


class _Uncut:
    """``with uncut:`` a call into a library that runs without the GIL and takes locks of its own: a fork waits for it.

    In a child cut out of such a call the library's lock would stay taken for ever.
    """

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """No call is under way."""
        self._state = threading.Condition(threading.Lock())
        self._calls = 0

    def __enter__(self) -> None:
        with self._state:
            self._calls += 1

    def __exit__(self, *_: object) -> None:
        with self._state:
            self._calls -= 1
            if not self._calls:
                self._state.notify_all()

    def stop(self, until: float) -> bool:
        """Let no call begin until ``go``, and wait for those under way; False where they took too long."""
        if not self._state.acquire(timeout=max(0.0, until - time.monotonic())):
            return False
        self._state.wait_for(lambda: not self._calls, max(0.0, until - time.monotonic()))
        return True

    def go(self) -> None:
        """Calls may begin again."""
        self._state.release()


uncut = _Uncut()


def hold_while_forking(owner: Any, name: str, order: int = BRIEF) -> None:
    """Take a lock of an object (or of a module) before every fork.

    Args:
        owner: what has the lock; not kept alive.
        name: of its attribute.
        order: see ``LOADING``.
    """
    _locks.append((order, weakref.ref(owner), name))
    _locks.sort(key=lambda each: each[0])
    if len(_locks) % 256 == 0:
        _locks[:] = [each for each in _locks if each[1]() is not None]


def renew_in_child(renew: Callable[[], None]) -> None:
    """Call a method in every child; its object is not kept alive."""
    _renewals.append(weakref.WeakMethod(renew))
    if len(_renewals) % 256 == 0:
        _renewals[:] = [each for each in _renewals if each() is not None]


def _before() -> None:
    until = time.monotonic() + PATIENCE_S
    for _, owner, name in tuple(_locks):
        lock = getattr(owner(), name, None)
        if lock is None or any(lock is each for each in (*_held.taken, *_held.stuck)):
            continue
        taken = lock.acquire(timeout=max(0.0, until - time.monotonic()))
        (_held.taken if taken else _held.stuck).append(lock)
    _held.stopped = uncut.stop(until)  # last: whoever is within such a call waits for nobody


def _after() -> None:
    if _held.stopped:
        _held.stopped = False
        uncut.go()
    while _held.taken:
        _held.taken.pop().release()
    _held.stuck.clear()


def _in_child() -> None:
    _held.stopped = False
    uncut.renew()
    for lock in _held.stuck:
        lock._at_fork_reinit()
    _after()
    _free_cached_properties()
    for method in tuple(_renewals):
        if (renew := method()) is not None:
            renew()


def _free_cached_properties() -> None:
    """Up to Python 3.11 each has a lock for all objects, which another thread may have held: it computes anew here."""
    ours = [module for name, module in sys.modules.items() if name.partition(".")[0] == __package__]
    kinds = [kind for module in ours for kind in vars(module).values() if isinstance(kind, type)]
    for kind in kinds:
        for each in vars(kind).values():
            if isinstance(each, cached_property) and (lock := getattr(each, "lock", None)) is not None:
                lock._at_fork_reinit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_in_child)
