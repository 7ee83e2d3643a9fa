"""The ledger: what did this agent cost me, in money and in time, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import reduce
from pathlib import Path
from typing import TypeVar

from ..budget import Budget
from ..errors import ConfigError, LedgerError
from .grouped_totals import By, GroupedTotals
from .latency import Quantiles
from .record import GenerationRecord
from .recording import Recording
from .store import LedgerStore, MemoryLedger, ReadOnly, records_to_sum
from .totals import NO_SUMS, RunningTotal, Totals, add_sums, sums_of, totals_from
from .what_if import WhatIf, replay

_scopes: ContextVar[tuple[tuple[Ledger, RunningTotal], ...]] = ContextVar("s2t_ledger_scopes", default=())


class Ledger:
    """Keeps one record per generation and adds them up.

    ::

        ledger = Ledger.open("costs.jsonl")     # or "costs.db"; Ledger() keeps them in memory
        with ledger.scope() as running:
            agent.invoke(...)
            print(running.now.cost_usd.total.usd)
        print(ledger.totals("agent"))

    Args:
        store: where records are kept; memory by default.
        recording: what is kept beside sums and receipts: steps, text.

    Raises:
        ConfigError: what was given for a store is none, as the path of a file.
    """

    recording = Recording()

    def __init__(self, store: LedgerStore | None = None, *, recording: Recording | None = None) -> None:
        if not isinstance(store, LedgerStore | None):
            raise ConfigError(
                f"Ledger({store!r:.80}): this is no store, which has append, close and a way to iterate over records.",
                hint="For a file there is Ledger.open(path); Ledger() keeps records in memory.",
            )
        self._store: LedgerStore = MemoryLedger() if store is None else store
        self.recording = Recording() if recording is None else recording

    @classmethod
    def open(cls, path: str | Path, *, recording: Recording | None = None) -> Ledger:
        """A ledger in a file: ``.jsonl`` (one JSON object a line) or ``.db`` / ``.sqlite`` (SQLite).

        Args:
            path: the file; made when it does not exist.
            recording: what is kept beside sums and receipts: steps, text.

        Raises:
            LedgerError: another ending, a corrupt or foreign file (left as it is), or no way to write there.
        """
        from . import jsonl, sqlite

        kinds: dict[str, Callable[[Path], LedgerStore]] = {"jsonl": jsonl.JsonlLedger, "sqlite": sqlite.SQLiteLedger}
        return cls(_of_kind(path, kinds)(Path(path)), recording=recording)

    @classmethod
    def reading(cls, path: str | Path) -> Ledger:
        """A ledger's file that is only read: nothing is made or changed, and :meth:`record` refuses.

        Raises:
            LedgerError: another ending, or no such file; damage inside raises when it is read.
        """
        from . import jsonl, sqlite

        read = _of_kind(path, {"jsonl": jsonl.read_records, "sqlite": sqlite.read_records})
        if not Path(path).is_file():
            raise LedgerError(f"{path}: there is no such ledger.", hint="Give the file that Ledger.open() writes.")
        return cls(ReadOnly(Path(path).absolute(), read))

    def record(self, rec: GenerationRecord) -> None:
        """Keep one record, and count it in every scope that is open around the caller.

        Raises:
            LedgerError: it could not be written. It counts in the scopes all the same.
        """
        try:
            self._store.append(rec)
        finally:  # kept or not, it was spent, and a loop that stops at a running total must see it
            for ledger, running in _scopes.get():
                if ledger is self:
                    running.add(rec)

    def __iter__(self) -> Iterator[GenerationRecord]:
        """Every record, one by one, in the order they were kept."""
        return iter(self._store)

    def records(
        self, *, agent: str | None = None, thread_id: str | None = None, run_id: str | None = None
    ) -> list[GenerationRecord]:
        """The records that match everything given, in the order they were kept."""
        return [
            record
            for record in self._store
            if (agent is None or record.agent == agent)
            and (thread_id is None or record.thread_id == thread_id)
            and (run_id is None or record.run_id == run_id)
        ]

    def totals(self, by: By = "agent") -> dict[str, Totals]:
        """Sums per agent, thread, run or UTC day, in order of first appearance. They add up to :meth:`total`."""
        return {key: sums for key, sums, _ in self.grouped(by)}

    def total(self) -> Totals:
        """The sum of every record."""
        return totals_from(reduce(add_sums, map(sums_of, records_to_sum(self._store)), NO_SUMS))

    def latency(self, by: By = "agent") -> dict[str, dict[str, Quantiles]]:
        """p50, p95, p99 in ms of every part of the latency, per agent, thread, run or UTC day."""
        return {key: split for key, _, split in self.grouped(by)}

    def grouped(self, by: By = "agent") -> GroupedTotals:
        """Totals and latency in one pass, which keeps no record.

        Raises:
            LedgerError: a grouping that is not known or has too many groups; a file that cannot be read.
        """
        return GroupedTotals(records_to_sum(self._store), by)

    @contextmanager
    def scope(self) -> Iterator[RunningTotal]:
        """A running total of what is recorded inside the block, readable at any moment.

        Follows the context: tasks and LangChain's own threads started inside count, a bare
        ``threading.Thread`` does not. Scopes nest.
        """
        running = RunningTotal()
        token = _scopes.set((*_scopes.get(), (self, running)))
        try:
            yield running
        finally:
            _scopes.reset(token)

    def what_if(self, budget: Budget) -> WhatIf:
        """Replay every receipt, oldest generation first, under another budget. Spends nothing.

        Args:
            budget: only its limits are used (the whole chain's), on fresh meters and the records' own time.
        """
        return replay(sorted(self._store, key=lambda record: record.started_at), budget)

    def close(self) -> None:
        """Close files."""
        self._store.close()


_ENDINGS = {".jsonl": "jsonl", ".db": "sqlite", ".sqlite": "sqlite", ".sqlite3": "sqlite"}
_T = TypeVar("_T")


def _of_kind(path: str | Path, kinds: dict[str, _T]) -> _T:
    kind = _ENDINGS.get(Path(path).suffix.lower())
    if kind is None:
        raise LedgerError(f"{path}: not a ledger file name.", hint=f"End it in one of {', '.join(_ENDINGS)}.")
    return kinds[kind]
