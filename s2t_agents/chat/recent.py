"""A bounded cache of what takes long to make: the least recently used goes first."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from ..fork_safety import BUILDING, hold_while_forking

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """The values of the last keys that were asked for; threads may share it.

    Keys are compared by ``==``, one after the other, so they need no hash.

    Args:
        size: how many are kept, at least 1.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.RLock()  # the same thread may fork while it makes a value
        hold_while_forking(self, "_lock", BUILDING)
        self._kept: list[tuple[K, V]] = []  # what was used last stands last

    def __len__(self) -> int:
        """Number of values that are kept."""
        return len(self._kept)

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value of a key, made where none is kept: once, also for callers at the same time.

        Raises:
            BaseException: of ``make``; nothing is kept then.
        """
        with self._lock:
            found = next((each for each in self._kept if each[0] == key), None) or (key, make())
            others = [each for each in self._kept if each is not found]
            self._kept = [*others, found][-self._size :]
            return found[1]
