"""Records as JSON lines: append-only, readable by anything, proof against a killed writer.

Line 1 names the format; every other line is a record. Each append is one ``write`` to a file opened for
appending, under the file's lock where the system has one. A writer killed in the middle leaves at most the
beginning of one line. The next writer closes it with a seal (``{"torn": bytes}``), and readers step over it; any
other line that is not a record is corruption, and said so. Nothing is synced to the disk by force: a power cut
may lose what the system had not written yet. The file may be rotated, moved or truncated at any time: the next
record begins a new one.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from s2t_agents.errors import LedgerError
from s2t_agents.ledger.record import GenerationRecord

try:
    import fcntl
except ImportError:  # Windows appends without the lock: one writing process there
    fcntl = None  # type: ignore[assignment]

HEADER = b'{"s2t_ledger": 1}\n'
_SEALED = b'{"torn"'
_SEAL = b'{"torn": %d}\n'


class JsonlLedger:
    """A ledger file of JSON lines; several threads and processes may append at once.

    Args:
        path: the file; made when it does not exist. A relative one means the directory that is current now.

    Raises:
        LedgerError: it exists and is something else (left as it is), or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._lock = threading.Lock()
        try:
            if self.path.exists() and self.path.stat().st_size:
                with self.path.open("rb") as file:  # a file that may only be read can be reported on
                    self._check(file.read(len(HEADER)))
            else:
                with self._appending():
                    pass
        except OSError as error:
            raise LedgerError(
                f"{path}: {error.strerror or error}.", hint="Choose a place that can be written."
            ) from None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as its path: another process opens the same file."""
        return JsonlLedger, (self.path,)

    def append(self, record: GenerationRecord) -> None:
        """Append one line.

        Raises:
            LedgerError: the disk is full, the file may not be written, or another was put in its place.
        """
        line = record.model_dump_json().encode() + b"\n"
        try:
            with self._lock, self._appending() as file:
                torn = _torn_bytes(file)
                if torn:
                    file.write(b"\n" + _SEAL % torn)
                if file.write(line) != len(line):
                    raise LedgerError(f"{self.path}: the disk took only part of a record.", hint="Make room.")
        except OSError as error:
            raise LedgerError(f"{self.path}: {error.strerror or error}.", hint="The record was not kept.") from None

    def __iter__(self) -> Iterator[GenerationRecord]:
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise LedgerError(f"{self.path}: {error.strerror or error}.") from None
        if content:
            self._check(content[: len(HEADER)])
        lines = content.split(b"\n")
        for number, line in enumerate(lines[1:], start=2):
            if not line or line.startswith(_SEALED):
                continue
            try:
                yield GenerationRecord.model_validate_json(line)
            except ValidationError:
                following = lines[number] if number < len(lines) else None  # number counts from 1: the next line
                if following is None or following.startswith(_SEALED):
                    continue  # torn by a killed writer
                raise LedgerError(
                    f"{self.path}, line {number}, is not a record: {line[:60]!r}.",
                    hint="The file was changed by something else; take that line out to read the rest.",
                ) from None

    def close(self) -> None:
        """Nothing is kept open between records."""

    @contextlib.contextmanager
    def _appending(self) -> Iterator[IO[bytes]]:
        """The file that is at the path now, locked, with its header."""
        with self.path.open("ab+", buffering=0) as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            if header := file.read(len(HEADER)):
                self._check(header)
            else:
                file.write(HEADER)
            yield file

    def _check(self, header: bytes) -> None:
        if header != HEADER:
            raise LedgerError(
                f"{self.path} is not a ledger of JSON lines.", hint="Choose another file; it was not changed."
            )


def _torn_bytes(file: IO[bytes]) -> int:
    """How many bytes follow the last newline: a record whose writer was killed."""
    size, block = file.seek(0, os.SEEK_END), 4096
    while True:
        start = max(0, size - block)
        file.seek(start)
        tail = file.read(size - start)
        newline = tail.rfind(b"\n")
        if newline >= 0 or start == 0:
            return len(tail) - newline - 1
        block *= 8
