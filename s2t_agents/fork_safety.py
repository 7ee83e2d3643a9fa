"""``os.fork()`` in a process with running threads: in the child every lock is free and its data consistent.

A fork takes all registered locks first, so it waits for forward passes, loading and updates in other threads (as
Python's ``logging`` does), and releases them in the parent. Other threads' generations do not exist in the child.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import count
from typing import Any

MAX_WAIT_S = 60.0
"""Seconds that a fork waits in all, for example for a model that is being loaded; locks still held are reset."""

BUILDING, SHARING, LOADING, FORWARD, BRIEF = range(5)
"""Lock order, the same as in code that takes several locks: an engine is built (BUILDING) over a model that others may
share (SHARING), which is read by one thread at a time (LOADING) and tried in a forward (FORWARD)."""

_locks: dict[int, tuple[int, weakref.ref[Any], str]] = {}
_renewals: dict[int, weakref.WeakMethod[Callable[[], None]]] = {}
_numbers = count()
"""Keys of both. An entry goes with its object; each change is one operation of a dict, which needs no lock."""


class _LocksHeld(threading.local):
    """The locks that the forking thread holds; thread-local, since several threads may fork at once."""

    def __init__(self) -> None:
        self.taken: list[Any] = []
        self.stuck: list[Any] = []
        self.stopped = False


_held = _LocksHeld()


class _ForkDelay:
    """``with delay_fork:`` a call into a library that releases the GIL and takes its own locks; a fork waits for it.

    A child forked in the middle of such a call would find the library's lock held for ever.
    """

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Reset: no call is running."""
        self._lock = threading.Lock()  # taken itself by calls: half the price of the condition, several times a token
        self._state = threading.Condition(self._lock)
        self._calls, self._stopping = 0, False

    def __enter__(self) -> None:
        with self._lock:
            self._calls += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._calls -= 1
            if self._stopping and not self._calls:
                self._state.notify_all()

    def stop(self, until: float) -> bool:
        """Block new calls until ``go`` and wait for running ones; False if they took too long."""
        if not self._state.acquire(timeout=max(0.0, until - time.monotonic())):
            return False
        self._stopping = True
        self._state.wait_for(lambda: not self._calls, max(0.0, until - time.monotonic()))
        return True

    def go(self) -> None:
        """Unblock calls."""
        self._stopping = False
        self._state.release()


delay_fork = _ForkDelay()


def hold_while_forking(owner: Any, name: str, order: int = BRIEF) -> None:
    """Register a lock that is taken before every fork.

    Args:
        owner: object or module with the lock; held weakly.
        name: attribute name of the lock.
        order: see ``BUILDING``.
    """
    number = next(_numbers)
    _locks[number] = order, weakref.ref(owner, lambda _: _locks.pop(number, None)), name


def registered_locks() -> Iterator[tuple[Any, str]]:
    """Owner and attribute name of every lock that is taken before a fork, in the order in which they are taken."""
    for _, owner, name in sorted(_locks.values(), key=lambda each: each[0]):
        if (living := owner()) is not None:
            yield living, name


def renew_in_child(renew: Callable[[], None]) -> None:
    """Register a method that is called in every child; its object is held weakly."""
    number = next(_numbers)
    _renewals[number] = weakref.WeakMethod(renew, lambda _: _renewals.pop(number, None))


def _before() -> None:
    until = time.monotonic() + MAX_WAIT_S
    for owner, name in registered_locks():
        lock = getattr(owner, name, None)
        if lock is None or any(lock is each for each in (*_held.taken, *_held.stuck)):
            continue
        taken = lock.acquire(timeout=max(0.0, until - time.monotonic()))
        (_held.taken if taken else _held.stuck).append(lock)
    _held.stopped = delay_fork.stop(until)  # last: code inside such a call waits for no lock


def _after() -> None:
    if _held.stopped:
        _held.stopped = False
        delay_fork.go()
    while _held.taken:
        _held.taken.pop().release()
    _held.stuck.clear()


def _in_child() -> None:
    _held.stopped = False
    delay_fork.renew()
    for lock in _held.stuck:
        lock._at_fork_reinit()
    _after()
    _free_cached_properties()
    for method in list(_renewals.values()):
        if (renew := method()) is not None:
            renew()


def _free_cached_properties() -> None:
    """Reset the locks of cached properties (Python up to 3.11), which another thread may have held."""
    ours = [module for name, module in sys.modules.items() if name.partition(".")[0] == __package__]
    kinds = [kind for module in ours for kind in vars(module).values() if isinstance(kind, type)]
    for kind in kinds:
        for each in vars(kind).values():
            if isinstance(each, cached_property) and (lock := getattr(each, "lock", None)) is not None:
                lock._at_fork_reinit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_in_child)
