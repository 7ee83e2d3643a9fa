"""Charges that could not be settled because the store was unavailable at that moment."""

from __future__ import annotations

import contextlib
import logging
from collections import deque

from ..errors import BadLimit
from .quantities import Counts
from .store import BudgetStore

_log = logging.getLogger(__name__)


class UnsettledCharges:
    """A queue of one process's unsettled charges, settled before anything new is reserved."""

    def __init__(self) -> None:
        self._queue: deque[tuple[str, Counts, Counts]] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, hold_id: str, actual: Counts, reserved: Counts) -> None:
        """Keep the charge of a hold for later, with what was reserved for it."""
        self._queue.append((hold_id, actual, reserved))
        _log.warning("budget store unavailable: the charge of hold %s waits to be settled", hold_id)

    def settle_all(self, store: BudgetStore) -> None:
        """Settle every charge in the queue; one beyond what the store counts at what was reserved, or not at all.

        Raises:
            StoreUnavailable: still unavailable; what is left stays in the queue.
        """
        while self._queue:
            try:
                waiting = self._queue.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                _settle(store, *waiting)
            except BaseException:
                self._queue.appendleft(waiting)
                raise


def _settle(store: BudgetStore, hold_id: str, actual: Counts, reserved: Counts) -> None:
    for counted in (actual, reserved):
        with contextlib.suppress(BadLimit):
            store.settle(hold_id, counted)
            return
    store.release(hold_id)  # nothing may be reserved before the queue is empty
    _log.error("the charge of hold %s is more than a budget can count, and is not booked", hold_id)
