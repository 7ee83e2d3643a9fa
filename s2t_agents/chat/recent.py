"""A bounded cache of what takes long to make: the least recently used goes first."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from ..fork_safety import BUILDING, hold_while_forking

K = TypeVar("K")
V = TypeVar("V")


class _Entry(Generic[K, V]):
    """One key, and its value once that is made."""

    def __init__(self, key: K) -> None:
        self.key = key
        self.made: list[V] = []
        self.lock = threading.RLock()  # the same thread may fork while it makes the value
        hold_while_forking(self, "lock", BUILDING)


class Recent(Generic[K, V]):
    """The values of the last keys that were asked for; threads may share it.

    Keys are compared by ``==``, one after the other, so they need no hash.

    Args:
        size: how many are kept, at least 1.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.RLock()  # garbage collection may run anything inside
        hold_while_forking(self, "_lock")
        self._kept: list[_Entry[K, V]] = []  # what was used last stands last

    def __len__(self) -> int:
        """Number of values that are kept, or being made."""
        return len(self._kept)

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value of a key, made where none is kept: once, also for callers at the same time.

        Callers with other keys do not wait meanwhile.

        Raises:
            BaseException: of ``make``; nothing is kept then.
        """
        with self._lock:
            known = next((each for each in self._kept if each.key == key), None)
            entry = self._used(known or _Entry[K, V](key))
        with entry.lock:
            if not entry.made:
                try:
                    entry.made.append(make())
                except BaseException:
                    with self._lock:
                        self._kept = [each for each in self._kept if each is not entry]
                    raise
                with self._lock:
                    self._used(entry)  # it may have gone meanwhile: an earlier try failed, or others were used
            return entry.made[0]

    def _used(self, entry: _Entry[K, V]) -> _Entry[K, V]:
        """Keep an entry, as the one used last."""
        others = [each for each in self._kept if each is not entry and each.key != entry.key]
        self._kept = [*others, entry][-self._size :]
        return entry
