"""The ledger: what did this agent cost me, in money and in time, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Literal

from s2t_agents.budget import Budget
from s2t_agents.errors import LedgerError
from s2t_agents.ledger.latency import Quantiles, latency_split
from s2t_agents.ledger.record import GenerationRecord
from s2t_agents.ledger.store import LedgerStore, MemoryLedger
from s2t_agents.ledger.totals import RunningTotal, Totals, totals_of
from s2t_agents.ledger.what_if import WhatIf, replay

By = Literal["agent", "thread", "run", "day"]

NO_KEY = "(none)"

_KEYS: dict[str, Callable[[GenerationRecord], str]] = {
    "agent": lambda record: record.agent,
    "thread": lambda record: record.thread_id or NO_KEY,
    "run": lambda record: record.run_id or NO_KEY,
    "day": lambda record: record.started_at.date().isoformat(),
}

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
    """

    def __init__(self, store: LedgerStore | None = None) -> None:
        self._store: LedgerStore = store or MemoryLedger()

    @classmethod
    def open(cls, path: str | Path) -> Ledger:
        """A ledger in a file: ``.jsonl`` (one JSON object a line) or ``.db`` / ``.sqlite`` (SQLite).

        Raises:
            LedgerError: another ending, a corrupt or foreign file (left as it is), or no way to write there.
        """
        from s2t_agents.ledger.jsonl import JsonlLedger
        from s2t_agents.ledger.sqlite import SQLiteLedger

        kinds: dict[str, Callable[[Path], LedgerStore]] = {
            ".jsonl": JsonlLedger,
            ".db": SQLiteLedger,
            ".sqlite": SQLiteLedger,
            ".sqlite3": SQLiteLedger,
        }
        kind = kinds.get(Path(path).suffix.lower())
        if kind is None:
            raise LedgerError(f"{path}: not a ledger file name.", hint=f"End it in one of {', '.join(kinds)}.")
        return cls(kind(Path(path)))

    def record(self, rec: GenerationRecord) -> None:
        """Keep one record, and count it in every scope that is open around the caller.

        Raises:
            LedgerError: it could not be written.
        """
        self._store.append(rec)
        for ledger, running in _scopes.get():
            if ledger is self:
                running.add(rec)

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
        return {key: sum(map(totals_of, group), Totals()) for key, group in self._grouped(by).items()}

    def total(self) -> Totals:
        """The sum of every record."""
        return sum(map(totals_of, self._store), Totals())

    def latency(self, by: By = "agent") -> dict[str, dict[str, Quantiles]]:
        """p50, p95, p99 in ms of every part of the latency, per agent, thread, run or UTC day."""
        return {key: latency_split(group) for key, group in self._grouped(by).items()}

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
        """Let go of files."""
        self._store.close()

    def _grouped(self, by: By) -> dict[str, list[GenerationRecord]]:
        if by not in _KEYS:
            raise LedgerError(f"by={by!r}: no such grouping.", hint=f"Use one of {', '.join(_KEYS)}.")
        groups: dict[str, list[GenerationRecord]] = {}
        for record in self._store:
            groups.setdefault(_KEYS[by](record), []).append(record)
        return groups
