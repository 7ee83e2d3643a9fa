"""The ledger beside the budgets: one record per generation, one receipt per escalation, sums that add up.

Flow: ``GenerationRecord`` -> ``Ledger.record`` -> ``LedgerStore`` (memory, JSONL, SQLite) -> ``totals`` / ``latency``
/ ``what_if`` / ``report``.
"""

from .latency import Quantiles
from .ledger import Ledger
from .record import (
    Cost,
    GenerationRecord,
    Latency,
    Receipt,
    ReceiptCandidate,
    Shadow,
    StepRecord,
    StepTimes,
    Thought,
)
from .recording import Recording
from .store import LedgerStore, MemoryLedger
from .totals import CostSum, RunningTotal, Totals
from .what_if import WhatIf

__all__ = [
    "Cost",
    "CostSum",
    "GenerationRecord",
    "Latency",
    "Ledger",
    "LedgerStore",
    "MemoryLedger",
    "Quantiles",
    "Receipt",
    "ReceiptCandidate",
    "Recording",
    "RunningTotal",
    "Shadow",
    "StepRecord",
    "StepTimes",
    "Thought",
    "Totals",
    "WhatIf",
]
