"""Meters in one SQLite file: the store for several processes on one machine.

Every operation is one ``BEGIN IMMEDIATE`` transaction in write-ahead mode, so a process killed at any moment
leaves a whole operation or none, and its open holds lapse. ``synchronous=NORMAL``: a power cut may lose the last
moments of settled spending (the file stays whole); a killed process loses nothing.

Time is the machine's monotonic clock, which all its processes share and which cannot be set. It starts again at a
reboot, and so do holds (their owners are gone); deadlines are carried over by the calendar clock.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import BadLimit, BadStore, ConfigError, StoreUnavailable
from ..fork_safety import hold_while_forking
from ..sqlite_file import DAMAGED, OwnFile, busy, damage_of
from .clock import Clock, SystemClock
from .meter import Meter
from .quantities import Counts
from .sqlite_rows import (
    APPLICATION_ID,
    LATER,
    SCHEMA,
    boot_id,
    hold_paths,
    load_holds,
    load_meter,
    note_grant,
    reset_after_reboot,
    save_hold,
    save_meter,
)
from .state import BudgetState
from .store import Chain, Closing, Refusal, Terms

MAX_WAIT_S = 86_400
LATCH_S = 0.004
"""Seconds that SQLite itself waits for other processes, while the other threads wait for this one."""
PAUSE_S = 0.03
"""Seconds between tries, at most."""
KEEP_LAPSED_US = 7 * 86_400_000_000
"""How long a lapsed hold is remembered, so that settling it late is still booked."""


class SQLiteStore:
    """Meters in a file. Threads share one connection; processes share the file.

    Args:
        path: the file; made when it does not exist. Keep it on a local disk, not a network share. A relative one
            means the directory that is current now.
        wait_s: seconds that one operation waits for other threads and processes, all together, before it gives up
            (``StoreUnavailable``).
        clock: the time; tests hand in their own.

    Raises:
        ConfigError: a time to wait that cannot be meant.
        BadStore: the file is damaged or not a budget store (it is left as it is).
        StoreUnavailable: it cannot be opened now.
    """

    shared = True

    def __init__(self, path: str | Path, *, wait_s: float = 10.0, clock: Clock | None = None) -> None:
        if not 0 <= wait_s <= MAX_WAIT_S:
            raise ConfigError(f"wait_s is {wait_s!r}; it must be from 0 to {MAX_WAIT_S} seconds.")
        self.path, self._wait_s = Path(path).absolute(), wait_s
        self._clock = clock or SystemClock()
        self._lock = threading.RLock()
        hold_while_forking(self, "_lock")
        with self._lock:  # a fork waits: SQLite has locks of its own
            self._file = OwnFile(self.path, APPLICATION_ID, SCHEMA, "budget store", LATER)
        with self._transaction() as rows:
            reset_after_reboot(rows, boot_id(), self._now_us(), self._clock.wall())

    def open_meter(self, path: str, terms: Terms) -> Terms:
        """Make the meter unless it is there; the terms it has."""
        with self._transaction() as rows:
            found = load_meter(rows, path)
            if found is None:
                found = Meter.fresh(terms, self._now_us(), self._clock.wall())
                save_meter(rows, path, found, deadline_wall=self._wall_at(found))
            return found.terms

    def find_terms(self, path: str) -> Terms | None:
        """The terms of a meter, if there is one."""
        with self._transaction() as rows:
            found = load_meter(rows, path)
            return found.terms if found else None

    def reserve(self, chain: Chain, hold_id: str, want: Counts, ttl_us: int) -> Refusal | None:
        """Hold on the whole chain, or say why not."""
        with self._transaction() as rows:
            now_us = self._lapse_holds(rows)
            meters = [(path, self._current_meter(rows, path), final) for path, final in chain]
            for path, meter, final in meters:
                refused = meter.refusal(path, want, final, now_us)
                if refused is not None:
                    return refused
            for path, meter, _ in meters:
                save_meter(rows, path, meter.reserve(want))
            save_hold(rows, hold_id, [path for path, _ in chain], want, now_us + ttl_us)
        return None

    def settle(self, hold_id: str, actual: Counts) -> Closing:
        """Replace the hold by what was used."""
        return self._close_hold(hold_id, actual)

    def release(self, hold_id: str) -> Closing:
        """Give the hold back."""
        return self._close_hold(hold_id, None)

    def extend(self, path: str, more: Counts, once: str = "") -> bool:
        """Raise the limits."""
        with self._transaction() as rows:
            if once and not note_grant(rows, path, once):
                return False
            meter = self._current_meter(rows, path).extend(more, self._now_us())
            save_meter(rows, path, meter, deadline_wall=self._wall_at(meter))
            return True

    def read_state(self, path: str) -> BudgetState:
        """The meter now."""
        with self._transaction() as rows:
            now_us = self._lapse_holds(rows)
            chains = rows.execute("SELECT chain FROM holds WHERE lapsed = 0").fetchall()
            holds = sum(path in hold_paths(chain) for (chain,) in chains)
            return self._current_meter(rows, path).state(path, now_us, holds)

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        with self._lock:
            self._file.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (str(self.path), self._wait_s)

    def __repr__(self) -> str:
        return f"SQLiteStore({str(self.path)!r})"

    def _close_hold(self, hold_id: str, actual: Counts | None) -> Closing:
        with self._transaction() as rows:
            self._lapse_holds(rows)
            found = load_holds(rows, "id = ?", hold_id)
            if not found:
                return Closing.GONE
            _, paths, lapsed, held = found[0]
            for path in paths:
                meter = self._current_meter(rows, path)
                if not lapsed:
                    save_meter(rows, path, meter.settle(held, actual) if actual else meter.release(held))
                elif actual:  # its reservation was given back when it lapsed: all of it is overrun
                    save_meter(rows, path, meter.overrun(actual))
            rows.execute("DELETE FROM holds WHERE id = ?", (hold_id,))
            return Closing.LATE if lapsed else Closing.DONE

    def _lapse_holds(self, rows: sqlite3.Connection) -> int:
        """Give lapsed holds back; the time now."""
        now_us = self._now_us()
        over = load_holds(rows, "lapsed = 0 AND expires_us <= ?", now_us)
        for hold_id, paths, _, held in over:
            for path in paths:
                save_meter(rows, path, self._current_meter(rows, path).release(held))
            rows.execute("UPDATE holds SET lapsed = 1 WHERE id = ?", (hold_id,))
        if over:
            rows.execute("DELETE FROM holds WHERE lapsed = 1 AND expires_us < ?", (now_us - KEEP_LAPSED_US,))
        return now_us

    def _current_meter(self, rows: sqlite3.Connection, path: str) -> Meter:
        meter = load_meter(rows, path)
        if meter is None:
            raise StoreUnavailable(f"{self.path} no longer has the budget {path!r}.", hint="Open the budget again.")
        return meter.in_window_at(self._clock.wall()) if meter.terms.window else meter

    def _now_us(self) -> int:
        return int(self._clock.monotonic() * 1e6)

    def _wall_at(self, meter: Meter) -> float | None:
        """When the deadline is by the calendar, for the day after a reboot."""
        if meter.deadline_us is None:
            return None
        return self._clock.wall() + (meter.deadline_us - self._now_us()) / 1e6

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One atomic step: everything inside happens, or, on any error or interrupt, nothing does.

        Raises:
            StoreUnavailable: others kept it busy for ``wait_s`` seconds, be they threads or processes; or it cannot be
                read or written.
            BadStore: what is in it is no budget.
            BadLimit: more than a budget counts.
        """
        until = time.monotonic() + self._wait_s
        pause_s = LATCH_S
        while True:  # the lock is never held for long: while one thread waits for other processes, the others may try
            rows, state, ours = None, "opening", False
            try:
                ours = self._lock.acquire(timeout=max(LATCH_S, until - time.monotonic()))
                if not ours:
                    raise TimeoutError("it is locked by another thread of this process")
                rows = self._file.connection(LATCH_S)
                if rows.in_transaction:  # a second Ctrl-C interrupted the rollback of the first
                    rows.rollback()
                rows.execute("BEGIN IMMEDIATE")
                state = "open"
                yield rows
                state = "writing"
                rows.execute("COMMIT")
                return
            except BaseException as error:
                if rows is not None:
                    with contextlib.suppress(sqlite3.Error):
                        rows.execute("ROLLBACK")
                waits = busy(error) or isinstance(error, TimeoutError)
                if state != "opening" or not waits or time.monotonic() >= until:
                    problem = self._problem(error, untouched=state != "writing")
                    if problem is error:
                        raise
                    raise problem from error
            finally:
                if ours:
                    self._lock.release()
            time.sleep(min(pause_s, max(0.0, until - time.monotonic())))
            pause_s = min(2 * pause_s, PAUSE_S)

    def _problem(self, error: BaseException, *, untouched: bool) -> BaseException:
        """The error to raise for one inside a transaction; the same where SQLite and the content are not at fault."""
        if isinstance(error, StoreUnavailable | BadLimit) or not isinstance(error, Exception):
            return error
        if (damage := damage_of(error)) is not None:
            return BadStore(f"{self.path}: {damage}.", hint=DAMAGED, untouched=untouched)
        return StoreUnavailable(
            f"The budget store {self.path} cannot be used: {error}.",
            hint="Nothing was reserved or booked.",
            untouched=untouched,
        )


def _opened(path: str, wait_s: float) -> SQLiteStore:
    if not os.path.exists(path):
        raise BadStore(f"{path} is gone.", hint="The budget was pickled with this file; put it back.")
    return SQLiteStore(path, wait_s=wait_s)
