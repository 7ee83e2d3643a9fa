"""Meters in this process's memory, under one lock: the default, and the fastest."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from heapq import heappop, heappush
from typing import NamedTuple

from ..errors import StoreUnavailable
from .clock import Clock, SystemClock
from .meter import Meter
from .quantities import Counts
from .state import BudgetState
from .store import Chain, Closing, Refusal, Terms

TOMBSTONES = 100_000
"""Lapsed holds remembered, so that settling one late is still booked."""

SPARE_TIMES = 64
"""Times of holds that are closed already, kept beside as many as there are holds."""

PATIENCE = 32
"""How often an operation lets other threads go first before it queues for the lock."""


class _HoldRecord(NamedTuple):
    chain: Chain
    want: Counts
    expires_us: int


_Grant = tuple[str, str]
"""A meter's path and what names the grant; without a name it is not remembered."""


class _Change(NamedTuple):
    """What an operation does, in absolute values: the meters and the hold that there are after it, and a grant."""

    meters: dict[str, Meter]
    hold_id: str = ""
    held: _HoldRecord | None = None
    lapsed: _HoldRecord | None = None
    grant: _Grant | None = None


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
        self._lapsed: OrderedDict[str, _HoldRecord] = OrderedDict()
        self._times: list[tuple[int, str]] = []  # a heap of when holds lapse; some of these are closed already
        self._granted: set[_Grant] = set()
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
            if len(self._times) > 2 * len(self._holds) + SPARE_TIMES:
                self._times = sorted((held.expires_us, open_id) for open_id, held in self._holds.items())
            heappush(self._times, (expires_us, hold_id))
            self._commit(_Change(changed, hold_id, _HoldRecord(chain, want, expires_us)))
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
            self._commit(_Change({path: after}, grant=(path, once)))
            return True

    def read_state(self, path: str) -> BudgetState:
        """The meter now."""
        self._check_process()
        with self._lock:
            now_us = self._expire_holds()
            holds = sum(any(link.path == path for link in held.chain) for held in self._holds.values())
            return self._current_meter(path).state(path, now_us, holds)

    def close(self) -> None:
        """Nothing to close."""

    def _close_hold(self, hold_id: str, actual: Counts | None) -> Closing:
        self._check_process()
        with self._lock:
            self._expire_holds()
            lapsed = self._lapsed.get(hold_id)
            held = lapsed or self._holds.get(hold_id)
            if held is None:
                return Closing.GONE
            changed: dict[str, Meter] = {}
            for path, _ in held.chain:
                meter = self._current_meter(path)
                if lapsed:  # its reservation was given back when it lapsed: all of it is overrun
                    changed[path] = meter.overrun(actual) if actual else meter
                elif actual is None:
                    changed[path] = meter.release(held.want)
                else:
                    changed[path] = meter.settle(held.want, actual)
            self._commit(_Change(changed, hold_id))
            return Closing.LATE if lapsed else Closing.DONE

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
        while self._times and self._times[0][0] <= now_us:
            hold_id = self._times[0][1]
            held = self._holds.get(hold_id)
            if held is not None:
                back = {path: self._current_meter(path).release(held.want) for path, _ in held.chain}
                self._commit(_Change(back, hold_id, lapsed=held))
            heappop(self._times)
        while len(self._lapsed) > TOMBSTONES:
            self._lapsed.popitem(last=False)
        return now_us

    def _commit(self, change: _Change) -> None:
        self._journal = change
        self._replay()

    def _replay(self) -> None:
        """Carry out what is written down. Doing it twice changes nothing: the values are absolute."""
        if self._journal is None:
            return
        meters, hold_id, held, lapsed, grant = self._journal
        self._meters.update(meters)
        if grant is not None and grant[1]:
            self._granted.add(grant)
        if held is None:
            self._holds.pop(hold_id, None)
        else:
            self._holds[hold_id] = held
        if lapsed is None:
            self._lapsed.pop(hold_id, None)
        else:
            self._lapsed[hold_id] = lapsed
        self._journal = None
