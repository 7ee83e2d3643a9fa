"""Records as JSON lines: append-only, readable by anything, proof against a killed writer.

Line 1 names the format; every other line is a record. Each append is one ``write`` to a file opened for
appending, under the file's lock where the system has one (on Windows: one writing process).
A writer killed in the middle leaves at most the
beginning of one line. The next writer closes it with a seal (``{"torn": bytes}``), and readers step over it, also
where a seal was torn in its turn; blank lines, an editor's line ends and the headers of files that were joined are
stepped over as well. Any other line that is not a record is corruption, and an error. Nothing is synced
to the disk by force: a power cut may lose what the system had not written yet. The file may be rotated, moved or
truncated at any time: the next record begins a new one.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from codecs import getincrementaldecoder
from collections import deque
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from pydantic_core import from_json

from ..atomic_write import lock_to_append
from ..errors import LedgerError
from ..fork_safety import hold_while_forking
from .record import GenerationRecord, SummedRecord

HEADER = b'{"s2t_ledger": 1}\n'
_HEADER_OF_AN_EDITOR = b'{"s2t_ledger": 1}\r'
_SEAL = b'{"torn": %d}\n'
_SEAL_OR_ITS_BEGINNING = re.compile(rb'\{("(t(o(r(n("(:( (\d+\}?)?)?)?)?)?)?)?)?)?')


class JsonlLedger:
    """A ledger file of JSON lines; several threads and processes may append at once.

    Args:
        path: the file; made when it does not exist. A relative one means the directory that is current now.
        wait_s: seconds that a record waits for other writers.

    Raises:
        LedgerError: it exists and is something else (left as it is), or it cannot be written.
    """

    def __init__(self, path: Path, wait_s: float = 10.0) -> None:
        self.path, self._wait_s = path.absolute(), wait_s
        self._lock = threading.RLock()  # the garbage collector may end a lost stream in the middle of an append
        hold_while_forking(self, "_lock")
        self._late: deque[bytes] | None = None
        try:
            if self.path.exists() and self.path.stat().st_size:
                with self.path.open("rb") as file:
                    _check(self.path, file.read(len(HEADER)))
                with self.path.open("ab"):
                    return
            with self._appending(time.monotonic() + wait_s):
                pass
        except OSError as error:
            raise LedgerError(
                f"{path}: {error.strerror or error}.",
                hint="Choose a place that can be written, or Ledger.reading(path).",
            ) from None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as its path: another process opens the same file."""
        return JsonlLedger, (self.path, self._wait_s)

    def append(self, record: GenerationRecord) -> None:
        """Append one line, whole or not at all.

        Raises:
            LedgerError: the disk is full, the file may not be written, or another was put in its place.
        """
        line = record.model_dump_json().encode() + b"\n"
        until = time.monotonic() + self._wait_s
        if not self._lock.acquire(timeout=self._wait_s):
            raise LedgerError(f"{self.path}: other threads wrote for {self._wait_s:g} s.", hint=_NOT_KEPT)
        try:
            if self._late is not None:  # inside an append of this same thread, which holds the lock on the file
                self._late.append(line)
                return
            self._append([line], until)
        finally:
            self._lock.release()

    def __iter__(self) -> Iterator[GenerationRecord]:
        return read_records(self.path)

    def records_to_sum(self) -> Iterator[GenerationRecord]:
        """As ``store.records_to_sum``."""
        return read_records(self.path, SummedRecord)

    def close(self) -> None:
        """Nothing is kept open between records."""

    def _append(self, lines: list[bytes], until: float) -> None:
        while lines:
            self._late = deque()
            try:
                with self._appending(until) as file:
                    for line in lines:
                        self._write(file, line)
            except OSError as error:
                raise LedgerError(f"{self.path}: {error.strerror or error}.", hint=_NOT_KEPT) from None
            finally:
                lines, self._late = list(self._late), None

    def _write(self, file: IO[bytes], line: bytes) -> None:
        whole = _seal(file) + line
        start = file.seek(0, os.SEEK_END)
        try:
            if file.write(whole) == len(whole):
                return
        except OSError:
            file.truncate(start)
            raise
        file.truncate(start)
        raise LedgerError(f"{self.path}: the disk took only part of a record.", hint="Make room.")

    @contextlib.contextmanager
    def _appending(self, until: float) -> Iterator[IO[bytes]]:
        """The file that is at the path now, locked, with its header."""
        with self.path.open("ab+", buffering=0) as file:
            lock_to_append(file, until)
            file.seek(0)
            header = file.read(len(HEADER))
            if HEADER.startswith(header):
                file.write(HEADER[len(header) :])  # all of it, or what a killed writer left out
            _check(self.path, header)
            yield file


_NOT_KEPT = "The record was not kept."


def read_records(path: Path, kind: type[GenerationRecord] = GenerationRecord) -> Iterator[GenerationRecord]:
    """Every record of a file, one by one, as it was when this began. Changes nothing.

    Args:
        path: the file.
        kind: how much of each is read.

    Raises:
        LedgerError: no such file, not a ledger, or a line that is no record, with its number.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = file.readline(len(HEADER))
            _check(path, header)
            if header == _HEADER_OF_AN_EDITOR:
                header += file.readline(1)
            yield from _records(path, kind, _lines(file, size - len(header)))
    except OSError as error:
        raise LedgerError(f"{path}: {error.strerror or error}.") from None


def _lines(file: IO[bytes], size: int) -> Iterator[bytes]:
    """Lines of the next so many bytes."""
    while size > 0 and (line := file.readline(size)):
        size -= len(line)
        yield line


def _records(path: Path, kind: type[GenerationRecord], lines: Iterator[bytes]) -> Iterator[GenerationRecord]:
    doubtful: bytes | None = None
    for number, line in enumerate(chain(lines, [None]), start=2):
        if doubtful is not None and not _torn(doubtful, line):
            raise LedgerError(
                f"{path}, line {number - 1}, is not a record: {doubtful[:60]!r}.",
                hint="The file was changed by something else; take that line out to read the rest.",
            )
        doubtful = None
        if line is None or not line.strip() or line.startswith(b'{"torn"') or line.rstrip() == HEADER.rstrip():
            continue
        try:
            record = kind.model_validate_json(line)
        except Exception:  # noqa: BLE001 - validators may raise anything
            doubtful = line
            continue
        yield record


def _torn(line: bytes, following: bytes | None) -> bool:
    """Whether a line that is no record is the beginning of one, left by a killed writer."""
    if _is_json(line):
        return False
    if following is not None:
        return _SEAL_OR_ITS_BEGINNING.fullmatch(following.rstrip(b"\n")) is not None
    return not line.endswith(b"\n") or _begins_record(line)


def _is_json(line: bytes, *, or_begins: bool = False) -> bool:
    try:
        from_json(line, allow_partial="trailing-strings" if or_begins else False)
    except ValueError:
        return False
    return True


def _begins_record(line: bytes) -> bool:
    """Whether it is the beginning of an object, perhaps of half a character at its end."""
    try:
        text = getincrementaldecoder("utf-8")().decode(line.rstrip(b"\n"))
    except UnicodeDecodeError:
        return False
    return line.startswith(b"{") and not _is_json(line) and _is_json(text.encode(), or_begins=True)


def _seal(file: IO[bytes]) -> bytes:
    """What has to be written before the next line, after a writer that was killed."""
    last, torn = _last_lines(file)
    if torn:
        return b"\n" if _is_json(torn) else b"\n" + _SEAL % len(torn)
    return _SEAL % len(last) if _begins_record(last) else b""


def _last_lines(file: IO[bytes]) -> tuple[bytes, bytes]:
    """The last line that ended, and what follows it: a record whose writer was killed."""
    size, block = file.seek(0, os.SEEK_END), 8192
    while True:
        start = max(0, size - block)
        file.seek(start)
        *before, last, torn = (b"\n" + file.read(size - start)).split(b"\n")
        if len(before) > 1 or start == 0:
            return last, torn
        block *= 8


def _check(path: Path, header: bytes) -> None:
    """Nothing at all, and the beginning of a header, are a ledger that is empty."""
    if not HEADER.startswith(header) and header != _HEADER_OF_AN_EDITOR:
        raise LedgerError(f"{path} is not a ledger of JSON lines.", hint="Choose another file; it was not changed.")
