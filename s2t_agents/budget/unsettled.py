"""Charges that could not be settled because the store was unavailable at that moment."""

from __future__ import annotations

import logging
from collections import deque

from .quantities import Counts
from .store import BudgetStore

_log = logging.getLogger(__name__)


class UnsettledCharges:
    """A queue of one process's unsettled charges, settled before anything new is reserved."""

    def __init__(self) -> None:
        self._queue: deque[tuple[str, Counts]] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, hold_id: str, actual: Counts) -> None:
        """Keep the charge of a hold for later."""
        self._queue.append((hold_id, actual))
        _log.warning("budget store unavailable: the charge of hold %s waits to be settled", hold_id)

    def settle_all(self, store: BudgetStore) -> None:
        """Settle every charge in the queue.

        Raises:
            StoreUnavailable: still unavailable; what is left stays in the queue.
        """
        while self._queue:
            try:
                hold_id, actual = self._queue.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                store.settle(hold_id, actual)
            except BaseException:
                self._queue.appendleft((hold_id, actual))
                raise
