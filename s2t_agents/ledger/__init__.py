"""The ledger beside the budgets: one record per generation, one receipt per escalation, sums that add up.

Flow: ``GenerationRecord`` -> ``Ledger.record`` -> ``LedgerStore`` (memory, JSONL, SQLite) -> ``totals`` / ``latency``
/ ``what_if`` / ``report``.
"""

from s2t_agents.ledger.latency import Quantiles
from s2t_agents.ledger.ledger import Ledger
from s2t_agents.ledger.record import (
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
from s2t_agents.ledger.recording import Recording
from s2t_agents.ledger.store import LedgerStore, MemoryLedger
from s2t_agents.ledger.totals import CostSum, RunningTotal, Totals
from s2t_agents.ledger.what_if import WhatIf

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
