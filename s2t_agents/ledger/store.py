"""Where records are kept: a protocol, and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

from ..errors import LedgerError
from .record import GenerationRecord, SummedRecord


@runtime_checkable
class LedgerStore(Protocol):
    """Append and read. Implementations are safe for threads and raise ``LedgerError``."""

    def append(self, record: GenerationRecord) -> None:
        """Keep one record: after this returns, a killed process has not lost it (files)."""

    def __iter__(self) -> Iterator[GenerationRecord]:
        """Every record, in the order they were kept."""

    def close(self) -> None:
        """Close files."""


def records_to_sum(store: LedgerStore) -> Iterable[GenerationRecord]:
    """Every record, for sums: a store may have a method of this name that leaves out what they do not need."""
    quickly: Callable[[], Iterable[GenerationRecord]] | None = getattr(store, "records_to_sum", None)
    return store if quickly is None else quickly()


class MemoryLedger:
    """Records of this process, gone with it."""

    def __init__(self) -> None:
        self._records: list[GenerationRecord] = []

    def append(self, record: GenerationRecord) -> None:
        """Keep one record."""
        self._records.append(record)

    def __iter__(self) -> Iterator[GenerationRecord]:
        return iter(self._records[:])

    def close(self) -> None:
        """Nothing to close."""


class ReadOnly:
    """A file that is read and never written.

    Args:
        path: the file.
        read: reads it.
    """

    def __init__(self, path: Path, read: Callable[[Path, type[GenerationRecord]], Iterator[GenerationRecord]]) -> None:
        self._path, self._read = path, read

    def append(self, record: GenerationRecord) -> None:
        """Refuse.

        Raises:
            LedgerError: always.
        """
        raise LedgerError(f"{self._path} was opened to be read.", hint="Open it with Ledger.open() to write.")

    def __iter__(self) -> Iterator[GenerationRecord]:
        return self._read(self._path, GenerationRecord)

    def records_to_sum(self) -> Iterator[GenerationRecord]:
        """As ``store.records_to_sum``."""
        return self._read(self._path, SummedRecord)

    def close(self) -> None:
        """Nothing is kept open between passes."""
