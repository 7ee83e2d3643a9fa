"""``s2t report`` on a large ledger: seconds and megabytes, each report in a process of its own."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from s2t_agents.ledger import Cost, GenerationRecord, Latency, Receipt, ReceiptCandidate

KINDS = {"three receipts": 3, "no receipts": 0}
GROUPINGS = ("agent", "run")


def run(megabytes: int = 500, *, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Write ledgers of that size and report on them; ``say`` is told each report's figures as they come."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, receipts in KINDS.items():
            path = Path(folder, f"{receipts}.jsonl")
            records = write(path, receipts, megabytes * 2**20)
            for by in GROUPINGS:
                rows.append({"records": kind, "count": records, "by": by, **measured(path, by)})
                say(json.dumps(rows[-1]))
            path.unlink()
    return {"megabytes": megabytes, "cores": os.cpu_count(), "rows": rows}


def table(result: dict[str, Any]) -> Table:
    """The result for people."""
    shown = Table(*result["rows"][0], title=f"s2t report on {result['megabytes']} MB")
    for row in result["rows"]:
        shown.add_row(*map(str, row.values()))
    return shown


def write(path: Path, receipts: int, size: int) -> int:
    """Fill a file; one run for five records, seven agents. Gives the records."""
    dice, lines = random.Random(0), [record(n, receipts).model_dump_json().encode() + b"\n" for n in range(700)]
    count = written = 0
    with path.open("wb") as file:
        file.write(b'{"s2t_ledger": 1}\n')
        while written < size:
            run = f'"run_id":"{count // 5:032x}"'.encode()
            written += file.write(dice.choice(lines).replace(b'"run_id":"r"', run))
            count += 1
    return count


def record(number: int, receipts: int) -> GenerationRecord:
    """One as an agent's answers leave them."""
    candidates = tuple(
        ReceiptCandidate(token_id=token, text="tok", slm=-1.5, selector=-1.2, llm=-0.3) for token in range(8)
    )
    return GenerationRecord(
        agent=f"agent{number % 7}",
        run_id="r",
        cost_usd=Cost(local="0.1", llm="0.2"),
        latency_ms=Latency(queue=0, ttft=9, propose=500, select=40, escalate=300, grammar=5, total=900 + number),
        receipts=tuple(
            Receipt(step=step, prefix_tokens=9, outcome="picked", candidates=candidates) for step in range(receipts)
        ),
    )


def measured(path: Path, by: str) -> dict[str, float]:
    """Seconds and peak megabytes of ``s2t report``."""
    started = time.perf_counter()
    code = "import sys; from s2t_agents.cli import main; sys.argv[0] = 's2t'; main()"
    command = [sys.executable, "-c", code, "report", str(path), "--by", by, "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # its peak is that of the largest child so far
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(seconds, 1), "cpu_s": round(cpu, 1), "peak_mb_at_most": round(after.ru_maxrss / 1024)}
