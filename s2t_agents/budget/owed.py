"""Costs that were real but could not be booked, because the store was down at that moment."""

from __future__ import annotations

import logging
from collections import deque

from s2t_agents.budget.amount import Units
from s2t_agents.budget.store import BudgetStore

_log = logging.getLogger(__name__)


class Owed:
    """A queue of unbooked costs of one process, booked before anything new is reserved."""

    def __init__(self) -> None:
        self._queue: deque[tuple[str, Units]] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, hold: str, actual: Units) -> None:
        """Remember a cost."""
        self._queue.append((hold, actual))
        _log.warning("budget store unreachable: the cost of hold %s waits to be booked", hold)

    def pay(self, store: BudgetStore) -> None:
        """Book everything that is owed.

        Raises:
            StoreUnavailable: still down; what is left stays owed.
        """
        while self._queue:
            try:
                hold, actual = self._queue.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                store.settle(hold, actual)
            except BaseException:
                self._queue.appendleft((hold, actual))
                raise
