"""Meters in this process's memory, under one lock: the default, and the fastest."""

from __future__ import annotations

import os
import threading
import time
from typing import NamedTuple

from ..errors import StoreUnavailable
from .clock import Clock, SystemClock
from .meter import Meter
from .quantities import Counts
from .state import BudgetState
from .store import Chain, Closing, Refusal, Terms

TOMBSTONES = 100_000
"""Expired holds remembered, so that settling one late is still booked."""

PATIENCE = 32
"""How often an operation lets other threads go first before it queues for the lock."""


class _HoldRecord(NamedTuple):
    chain: Chain
    want: Counts
    expires_us: int
    expired: bool


_Grant = tuple[str, str]
"""A meter's path and what names the grant; without a name it is not remembered."""
_Change = tuple[dict[str, Meter], str, _HoldRecord | None, _Grant | None]


class MemoryStore:
    """Meters of one process. A forked child is refused: two copies of a budget would be two budgets.

    An operation that is interrupted at any line (Ctrl-C, a killed task) has either not happened or happens
    in full: the change is written down first and carried out by the next operation.

    Args:
        clock: the time; tests hand in their own.
    """

    shared = False

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._meters: dict[str, Meter] = {}
        self._holds: dict[str, _HoldRecord] = {}
        self._granted: set[_Grant] = set()
        self._expired: list[str] = []
        self._next_expiry_us = 2**63
        self._journal: _Change | None = None

    def open_meter(self, path: str, terms: Terms) -> Terms:
        """Make the meter unless it is there; the terms it has."""
        self._check_process()
        with self._lock:
            self._replay()
            if path not in self._meters:
                self._meters[path] = Meter.fresh(terms, self._now_us(), self._clock.wall())
            return self._meters[path].terms

    def find_terms(self, path: str) -> Terms | None:
        """The terms of a meter, if there is one."""
        found = self._meters.get(path)
        return found.terms if found else None

    def reserve(self, chain: Chain, hold_id: str, want: Counts, ttl_us: int) -> Refusal | None:
        """Hold on the whole chain, or say why not."""
        self._check_process()
        with self._lock:
            now_us = self._expire_holds()
            changed: dict[str, Meter] = {}
            for path, final in chain:
                meter = self._meters[path]
                if meter.terms.window is not None:
                    meter = self._current_meter(path)
                refused = meter.refusal(path, want, final, now_us)
                if refused is not None:
                    return refused
                changed[path] = meter.reserve(want)
            expires_us = now_us + ttl_us
            if expires_us < self._next_expiry_us:
                self._next_expiry_us = expires_us
            self._commit(changed, hold_id, _HoldRecord(chain, want, expires_us, False))
        return None

    def settle(self, hold_id: str, actual: Counts) -> Closing:
        """Replace the hold by what was used."""
        return self._close_hold(hold_id, actual)

    def release(self, hold_id: str) -> Closing:
        """Give the hold back."""
        return self._close_hold(hold_id, None)

    def extend(self, path: str, more: Counts, once: str = "") -> bool:
        """Raise the limits."""
        self._check_process()
        with self._lock:
            now_us = self._expire_holds()
            if once and (path, once) in self._granted:
                return False
            after = self._current_meter(path).extend(more, now_us)
            self._journal = ({path: after}, "", None, (path, once))
            self._replay()
            return True

    def read_state(self, path: str) -> BudgetState:
        """The meter now."""
        self._check_process()
        with self._lock:
            now_us = self._expire_holds()
            holds = sum(
                1 for held in self._holds.values() if not held.expired and any(link.path == path for link in held.chain)
            )
            return self._current_meter(path).state(path, now_us, holds)

    def close(self) -> None:
        """Nothing to close."""

    def _close_hold(self, hold_id: str, actual: Counts | None) -> Closing:
        self._check_process()
        with self._lock:
            if self._journal is not None or self._now_us() >= self._next_expiry_us:
                self._expire_holds()
            held = self._holds.get(hold_id)
            if held is None:
                return Closing.GONE
            changed: dict[str, Meter] = {}
            for path, _ in held.chain:
                meter = self._current_meter(path)
                if held.expired:  # its reservation was given back when it expired: all of it is overrun
                    changed[path] = meter.overrun(actual) if actual else meter
                elif actual is None:
                    changed[path] = meter.release(held.want)
                else:
                    changed[path] = meter.settle(held.want, actual)
            self._commit(changed, hold_id, None)
            return Closing.LATE if held.expired else Closing.DONE

    def _check_process(self) -> None:
        """Refuse a forked copy; then give a busy lock a moment.

        A thread that queues for the lock is handed it while its holder still has the GIL, and from then on every
        operation costs a switch of threads; one that lets the holder finish first is not.
        """
        for _ in range(PATIENCE):
            if not self._lock.locked():
                break
            time.sleep(0)
        if os.getpid() != self._pid:
            raise StoreUnavailable(
                "This budget is kept in the memory of another process; a copy here would spend its money twice.",
                hint="Give the budget a SQLiteStore or RedisStore, which processes can share.",
            )

    def _now_us(self) -> int:
        return int(self._clock.monotonic() * 1e6)

    def _current_meter(self, path: str) -> Meter:
        meter = self._meters[path]
        return meter if meter.terms.window is None else meter.in_window_at(self._clock.wall())

    def _expire_holds(self) -> int:
        """Finish an interrupted change, give lapsed holds back; the time now."""
        if self._journal is not None:
            self._replay()
        now_us = self._now_us()
        if now_us < self._next_expiry_us:
            return now_us
        for hold_id, held in [item for item in self._holds.items() if not item[1].expired]:
            if held.expires_us <= now_us:
                back = {path: self._current_meter(path).release(held.want) for path, _ in held.chain}
                self._commit(back, hold_id, held._replace(expired=True))
                self._expired.append(hold_id)
        while len(self._expired) > TOMBSTONES:
            self._holds.pop(self._expired.pop(0), None)
        waiting = (held.expires_us for held in self._holds.values() if not held.expired)
        self._next_expiry_us = min(waiting, default=2**63)
        return now_us

    def _commit(self, meters: dict[str, Meter], hold_id: str, held: _HoldRecord | None) -> None:
        self._journal = (meters, hold_id, held, None)
        self._replay()

    def _replay(self) -> None:
        """Carry out what is written down. Doing it twice changes nothing: the values are absolute."""
        if self._journal is None:
            return
        meters, hold_id, held, grant = self._journal
        self._meters.update(meters)
        if grant is not None and grant[1]:
            self._granted.add(grant)
        if held is None:
            self._holds.pop(hold_id, None)
        else:
            self._holds[hold_id] = held
        self._journal = None
