"""Records in one SQLite file: for long ledgers that several processes write and that can be queried.

Write-ahead log, one transaction a record. A killed process loses nothing that was recorded; after a power cut the
last moments may be missing, the file stays whole (``synchronous=NORMAL``). A file that was moved or replaced while open
refuses everything: SQLite would go on writing to the file that was moved.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import BadStore, LedgerError, StoreUnavailable
from ..fork_safety import hold_while_forking
from ..sqlite_file import DAMAGED, OwnFile, damage_of, recognise
from .record import GenerationRecord, SummedRecord

APPLICATION_ID = 0x5332_544C  # "S2TL"
_SCHEMA = """
CREATE TABLE records (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    started_at TEXT NOT NULL,
    agent TEXT NOT NULL,
    thread_id TEXT,
    run_id TEXT,
    record TEXT NOT NULL
);
CREATE INDEX records_by_agent ON records (agent, started_at);
"""


class SQLiteLedger:
    """A ledger in a SQLite file. The columns repeat what queries filter on; ``record`` is the whole, as JSON.

    Args:
        path: the file; made when it does not exist. A relative one means the directory that is current now.
        wait_s: seconds to wait for another writer.

    Raises:
        LedgerError: it exists and is something else, or damaged (left as it is), or cannot be written.
    """

    def __init__(self, path: Path, wait_s: float = 10.0) -> None:
        self.path, self._wait_s = path.absolute(), wait_s
        self._lock = threading.RLock()  # the garbage collector may end a lost stream in the middle of an append
        hold_while_forking(self, "_lock")
        self._closed = False
        try:
            self._file = OwnFile(self.path, APPLICATION_ID, _SCHEMA, "ledger")
            self._file.connection(wait_s)
        except (StoreUnavailable, sqlite3.Error, OSError) as error:
            raise LedgerError(str(error)) from None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as its path: another process opens the same file."""
        return SQLiteLedger, (self.path, self._wait_s)

    def append(self, record: GenerationRecord) -> None:
        """Write one record; it is kept when this returns.

        Raises:
            LedgerError: not written: disk full, file locked, damaged or taken away, or a record of that id is there.
        """
        row = (
            record.id,
            record.started_at.isoformat(),
            record.agent,
            record.thread_id,
            record.run_id,
            record.model_dump_json(),
        )
        with self._exclusive() as connection:
            try:
                connection.execute(
                    "INSERT INTO records (id, started_at, agent, thread_id, run_id, record) VALUES (?, ?, ?, ?, ?, ?)",
                    row,
                )
            except sqlite3.Error as error:
                raise LedgerError(f"{self.path}: {error}.", hint="The record was not kept.") from None

    def __iter__(self) -> Iterator[GenerationRecord]:
        return self._read(GenerationRecord)

    def records_to_sum(self) -> Iterator[GenerationRecord]:
        """As ``store.records_to_sum``."""
        return self._read(SummedRecord)

    def _read(self, kind: type[GenerationRecord]) -> Iterator[GenerationRecord]:
        with self._exclusive():  # the file is still there
            pass
        return read_records(self.path, kind)

    def close(self) -> None:
        """Close the file, for good."""
        with self._lock:
            self._closed = True
            self._file.close()

    @contextmanager
    def _exclusive(self) -> Iterator[sqlite3.Connection]:
        """The connection, for this thread alone; other threads and other processes are waited for ``wait_s`` in all."""
        until = time.monotonic() + self._wait_s
        if not self._lock.acquire(timeout=self._wait_s):
            raise LedgerError(f"{self.path}: database is locked.", hint="The record was not kept.")
        try:
            if self._closed:
                raise LedgerError(f"{self.path} was closed.", hint="Open the ledger again.")
            try:
                connection = self._file.connection(self._wait_s)
                connection.execute(f"PRAGMA busy_timeout={max(0, int(1000 * (until - time.monotonic())))}")
            except StoreUnavailable as gone:
                raise LedgerError(str(gone)) from None
            except (sqlite3.Error, OSError) as error:
                raise LedgerError(f"{self.path}: {error}.", hint="It was not touched.") from None
            yield connection
        finally:
            self._lock.release()


def read_records(path: Path, kind: type[GenerationRecord] = GenerationRecord) -> Iterator[GenerationRecord]:
    """Every record of a file, one by one, as it was when this began. Changes nothing in its folder.

    A write-ahead log without its index (a copy of the file and its ``-wal`` alone) is read from a copy in the temporary
    folder, which has to have room for both.

    Args:
        path: the file.
        kind: how much of each is read.

    Raises:
        LedgerError: not a ledger; damaged, with the number of the record that cannot be read; no room for the copy.
    """
    try:
        if not recognise(path, APPLICATION_ID, "ledger"):
            return
        with _opened_to_read(path) as connection:
            for number, text in connection.execute("SELECT number, record FROM records ORDER BY number"):
                try:
                    record = kind.model_validate_json(text)
                except Exception:  # noqa: BLE001 - validators may raise anything
                    raise LedgerError(f"{path}: record {number} cannot be read.", hint=DAMAGED) from None
                yield record
    except BadStore as error:
        raise LedgerError(str(error)) from None
    except (sqlite3.Error, OSError) as error:
        hint = DAMAGED if damage_of(error) else "It cannot be read now; it was not changed."
        raise LedgerError(f"{path}: {error}.", hint=hint) from None


@contextmanager
def _opened_to_read(path: Path) -> Iterator[sqlite3.Connection]:
    """Open to read beside writers, killed ones too; where it is not open elsewhere, without SQLite's extra files."""
    before = _state(path)
    log, index = (path.with_name(f"{path.name}{ending}") for ending in ("-wal", "-shm"))
    if not log.exists():
        with _connected(path, "mode=ro&immutable=1") as connection:
            yield connection
        if _state(path) != before:
            raise LedgerError(f"{path} was written to while it was read.", hint="Read it again.")
    elif index.exists():
        with _connected(path, "mode=ro") as connection:
            yield connection
    else:  # a copy or a backup: SQLite would make the log's index beside it, or fail where it cannot
        with TemporaryDirectory(prefix="s2t-ledger-") as folder:
            _copy(path, log, Path(folder))
            if index.exists() or _state(path) != before:
                raise LedgerError(f"{path} was opened to write while it was read.", hint="Read it again.")
            with _connected(Path(folder, path.name), "mode=ro") as connection:
                yield connection


def _copy(path: Path, log: Path, folder: Path) -> None:
    try:
        for file in (path, log):
            copyfile(file, folder / file.name)
    except OSError as error:
        raise LedgerError(
            f"{path} has a write-ahead log without its -shm file, so a copy is read, and {folder} did not take it:"
            f" {error.strerror or error}.",
            hint="Make room there, or name another folder in the environment variable TMPDIR.",
        ) from None


@contextmanager
def _connected(path: Path, how: str) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True)) as connection:
        connection.text_factory = bytes  # also what is no text at all gets its number
        yield connection


def _state(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns
