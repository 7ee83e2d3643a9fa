"""How fast budgets are: reserve + settle pairs per second, on every store, at 1 and 16 threads.

One budget, limited in dollars, escalations and tokens, shared by all threads. Redis is a server of
the benchmark's own on a free loopback port, and is set beside two bare PINGs, which no pair
can beat.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

from rich.table import Table

from s2t_agents.budget import Budget, BudgetStore, Charge, MemoryStore, RedisStore, SQLiteStore

THREADS = (1, 16)
SLICES = 4
TARGETS = {"memory": 50_000.0, "sqlite": 2_000.0}
"""Pairs per second at either thread count; Redis has half the raw round trip's as its target."""

_CHARGE = Charge(Decimal("0.000142"), llm_tokens=940)


def run(seconds: float = 1.0) -> dict[str, Any]:
    """Measure.

    Args:
        seconds: how long each of the cases runs.

    Returns:
        ``{"pairs_per_s": {store: {threads: n}}, "round_trips_per_s": {threads: n}, "targets": ..., "met": ...}`` with
        threads as text, as in JSON; Redis is left out, with a reason in ``"skipped"``, where there is no server.
    """
    pairs: dict[str, dict[str, float]] = {"memory": _rates([_spender(MemoryStore())], seconds)[0]}
    with tempfile.TemporaryDirectory() as place:
        store = SQLiteStore(Path(place) / "budget.db")
        pairs["sqlite"] = _rates([_spender(store)], seconds)[0]
        store.close()
    result: dict[str, Any] = {"pairs_per_s": pairs, "targets": {**TARGETS}, "skipped": {}}
    with _redis() as url:
        if url is None:
            result["skipped"]["redis"] = "redis-server is not installed"
        else:
            spend = _spender(RedisStore(url, prefix="s2t-bench", timeout_s=10))
            pairs["redis"], raw = _rates([spend, _pings(url)], seconds)
            result["round_trips_per_s"] = raw
            result["targets"]["redis"] = {threads: rate / 2 for threads, rate in raw.items()}
    result["met"] = {store: _met(pairs[store], result["targets"][store]) for store in pairs}
    result["machine"] = {"cpus": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()}
    return result


def table(result: dict[str, Any]) -> Table:
    """The result for people."""
    shown = Table(title="reserve + settle, pairs per second")
    for head in ("store", *(f"{threads} thread{'s' * (threads > 1)}" for threads in THREADS), "target", "met"):
        shown.add_column(head, justify="left" if head == "store" else "right")
    for store, rates in result["pairs_per_s"].items():
        target = result["targets"][store]
        text = f"{target:,.0f}" if isinstance(target, float) else "half of two PINGs"
        shown.add_row(
            store, *(f"{rate:,.0f}" for rate in rates.values()), text, "yes" if result["met"][store] else "no"
        )
    if "round_trips_per_s" in result:
        shown.add_row("two PINGs", *(f"{rate:,.0f}" for rate in result["round_trips_per_s"].values()), "", "")
    return shown


def _spender(store: BudgetStore) -> Callable[[], None]:
    budget = Budget(usd=900_000, escalations=10**12, llm_tokens=10**14, name=f"bench-{time.time_ns()}", store=store)

    def pair() -> None:
        budget.reserve(_CHARGE).settle(_CHARGE)

    return pair


def _pings(url: str) -> Callable[[], None]:
    """The two round trips that a pair cannot do without."""
    import redis

    client = redis.Redis.from_url(url)

    def pair() -> None:
        client.ping()
        client.ping()

    return pair


def _rates(calls: list[Callable[[], None]], seconds: float) -> list[dict[str, float]]:
    """Calls per second of each, in slices by turns: a machine that is busy meanwhile is busy for all of them."""
    found: list[dict[str, float]] = [{} for _ in calls]
    for threads in THREADS:
        slices = [[_rate(call, threads, seconds / SLICES) for call in calls] for _ in range(SLICES)]
        for which, rates in enumerate(found):
            rates[str(threads)] = round(sum(one[which] for one in slices) / SLICES, 1)
    return found


def _rate(pair: Callable[[], None], threads: int, seconds: float) -> float:
    """Calls per second, all threads together, first call (scripts, connections) left out."""
    pair()
    counts = [0] * threads
    start = threading.Barrier(threads + 1)
    until = [0.0]

    def work(number: int) -> None:
        start.wait()
        while time.perf_counter() < until[0]:
            for _ in range(10):
                pair()
            counts[number] += 10

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    began = time.perf_counter()
    until[0] = began + seconds
    start.wait()
    for worker in workers:
        worker.join()
    return sum(counts) / (time.perf_counter() - began)


def _met(rates: dict[str, float], target: float | dict[str, float]) -> bool:
    wanted = target if isinstance(target, dict) else dict.fromkeys(rates, target)
    return all(rates[threads] >= wanted[threads] for threads in rates)


@contextmanager
def _redis() -> Iterator[str | None]:
    """The URL of a server that lives as long as the block; None where ``redis-server`` is not installed."""
    program = shutil.which("redis-server")
    if program is None:
        yield None
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.02)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        server.terminate()
        server.wait(10)
