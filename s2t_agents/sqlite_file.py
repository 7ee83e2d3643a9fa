"""Opening a SQLite file that is ours, and never touching one that is not."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import MappingProxyType
from urllib.parse import quote

from .errors import BadStore, StoreUnavailable

VERSION = 1
DAMAGED = "The file is damaged; move it away and keep it, it was not changed."
_MAGIC = b"SQLite format 3\0"
_HEADER_BYTES = 100


def recognise(path: Path, application_id: int, what: str) -> bool:
    """Look before opening, at the file's first bytes alone: whether there is something in it.

    Raises:
        BadStore: a directory, something else than SQLite, another program's database, or a file that is cut off.
    """
    if not path.parent.is_dir():
        raise BadStore(f"{path}: there is no directory {path.parent}.", hint="Make it, or choose another place.")
    if not path.exists():
        return False
    if not path.is_file():
        raise BadStore(f"{path} is not a file.", hint=f"Choose a file for the {what}.")
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER_BYTES)
    except OSError as error:
        raise BadStore(f"{path} cannot be read: {error.strerror}.", hint=f"Choose a file for the {what}.") from None
    if not header:
        return False
    other = f"Choose another file for the {what}; this one was not changed."
    if not header.startswith(_MAGIC):
        raise BadStore(f"{path} is not a SQLite file.", hint=other)
    if len(header) < _HEADER_BYTES:
        raise BadStore(f"{path} is cut off after {len(header)} bytes.", hint=DAMAGED)
    if int.from_bytes(header[68:72], "big") != application_id:
        raise BadStore(f"{path} is a SQLite file of another program, not a {what}.", hint=other)
    version = int.from_bytes(header[60:64], "big")
    if version != VERSION:
        raise BadStore(f"{path} is a {what} of format {version}; this release reads {VERSION}.", hint=other)
    return True


def _check_pages(path: Path) -> None:
    try:
        where = f"file:{quote(path.absolute().as_posix())}?mode=ro"
        with closing(sqlite3.connect(where, uri=True, timeout=0)) as connection:
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except (sqlite3.Error, ValueError, TypeError) as error:
        if (damage := damage_of(error)) is None:  # busy or not readable now: opening it for work raises
            return
        raise BadStore(f"{path}: {damage}.", hint=DAMAGED) from None
    if found != "ok":
        raise BadStore(f"{path}: {found}.", hint=DAMAGED)


_NOT_THE_FILES = frozenset(
    {
        *(sqlite3.SQLITE_PERM, sqlite3.SQLITE_ABORT, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM),
        *(sqlite3.SQLITE_READONLY, sqlite3.SQLITE_INTERRUPT, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL),
        *(sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_NOLFS, sqlite3.SQLITE_AUTH),
    }
)
"""SQLite's errors about the disk, permissions and locks, not about the content of the file."""


def busy(error: BaseException) -> bool:
    """Whether another process had the file just then."""
    code = getattr(error, "sqlite_errorcode", None) if isinstance(error, sqlite3.Error) else None
    return code is not None and code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def damage_of(error: Exception) -> str | None:
    """The damage that an error while reading or writing a file shows; None where it shows none.

    Any error that is not SQLite's own came from reading a row of another form than ours.
    """
    if isinstance(error, OSError | MemoryError | sqlite3.ProgrammingError):
        return None
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", None)
        return None if code is not None and code & 0xFF in _NOT_THE_FILES else str(error)
    return f"its rows cannot be read ({type(error).__name__})"


class OwnFile:
    """A SQLite file of ours, and this process's connection to it. Its owner has the lock for threads.

    SQLite forbids using a connection across a fork, and would go on writing to a file that was moved.

    Args:
        path: the file; made when it does not exist.
        application_id: marks the file as ours.
        schema: statements that make it.
        what: the file is, for messages.
        later: definitions of the columns that each table got after files of the schema alone were written; those that
            a file lacks are added.

    Raises:
        BadStore: as :func:`recognise`; or a damaged file.
    """

    def __init__(
        self,
        path: Path,
        application_id: int,
        schema: str,
        what: str,
        later: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> None:
        if recognise(path, application_id, what):
            _check_pages(path)
        self._path, self._application_id, self._what = path, application_id, what
        self._schema, self._later = schema, later
        self._connection: sqlite3.Connection | None = None
        self._pid, self._identity = 0, (0, 0)

    def connection(self, wait_s: float) -> sqlite3.Connection:
        """This process's connection to the file that is at the path now, in which transactions are made by hand.

        Args:
            wait_s: seconds that SQLite waits for others, from when it is opened.

        Raises:
            StoreUnavailable: the file was removed or replaced since it was opened.
            sqlite3.Error: locked for longer than ``wait_s`` seconds, or not writable.
        """
        if self._connection is not None and _identity(self._path) != self._identity:
            raise StoreUnavailable(
                f"{self._path} was removed or replaced while in use.",
                hint=f"Put it back, or open the {self._what} again.",
            )
        self._leave_inherited()
        if self._connection is None:
            opened = self._open(wait_s)
            self._pid, self._identity = os.getpid(), _identity(self._path)
            self._connection = opened
        return self._connection

    def close(self) -> None:
        """Close the connection; the next use opens another."""
        self._leave_inherited()
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _leave_inherited(self) -> None:
        if self._connection is not None and self._pid != os.getpid():
            _inherited.append(self._connection)
            self._connection = None

    def _open(self, wait_s: float) -> sqlite3.Connection:
        """In write-ahead mode, with every table and column."""
        connection = sqlite3.connect(self._path, timeout=wait_s, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("BEGIN IMMEDIATE")
            (found,) = connection.execute("PRAGMA application_id").fetchone()
            if found == 0:  # before the write-ahead log, so that the file itself carries its mark from the start
                for statement in self._schema.split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id={self._application_id}")
                connection.execute(f"PRAGMA user_version={VERSION}")
            for table, columns in self._later.items():
                known = {name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})")}
                for column in columns:
                    if column.partition(" ")[0] not in known:
                        connection.execute(f"ALTER TABLE {table} ADD COLUMN {column}")
            connection.execute("COMMIT")
            _write_ahead(connection, time.monotonic() + wait_s)
            connection.execute("PRAGMA synchronous=NORMAL")
        except BaseException:
            connection.close()
            raise
        return connection


_inherited: list[sqlite3.Connection] = []  # a parent's connections: closing one here could drop its locks


def _identity(path: Path) -> tuple[int, int]:
    """Which file is at a path now; (0, 0) if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return (0, 0)
    return (found.st_dev, found.st_ino)


def _write_ahead(connection: sqlite3.Connection, until: float) -> None:
    """Switch the log over; SQLite does not wait for others here by itself."""
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > until:
                raise
            time.sleep(0.005)
