"""Budget stores of each kind, a clock that tests move, and a Redis server for the test session."""

from __future__ import annotations

import decimal
import itertools
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from s2t_agents.budget import Budget, BudgetStore, Charge, MemoryStore, RedisStore, SQLiteStore

ONE = Charge(Decimal(0))
FULL = 3 * 10**6
"""Dollars: as much again and again is soon more than a budget counts."""
TRAPS = [*decimal.BasicContext.traps]
CONTEXTS = {
    "two digits": decimal.Context(prec=2),
    "six digits": decimal.Context(prec=6),
    "nothing rounded": decimal.Context(prec=6, traps=TRAPS),
    "nothing rounded, many digits": decimal.Context(prec=28, traps=TRAPS),
    "no traps": decimal.Context(prec=3, traps=[]),
    "rounded down": decimal.Context(prec=4, rounding=decimal.ROUND_DOWN),
    "small exponents": decimal.Context(prec=9, Emin=-2, Emax=2, traps=TRAPS),
}
"""A program's own ways to compute, by what they do."""
STORES = ("memory", "sqlite", "redis")
SHARED = ("sqlite", "redis")
_names = itertools.count()


@dataclass
class FakeClock:
    """Stands still until told; the calendar can be set, the monotonic clock only moves on."""

    mono: float = 1_000.0
    date: float = 1_800_000_000.0

    def monotonic(self) -> float:
        return self.mono

    def wall(self) -> float:
        return self.date

    def advance(self, seconds: float) -> None:
        self.mono += seconds
        self.date += seconds


@dataclass
class RedisServer:
    """A real server on a free loopback port, which can be killed and started again."""

    folder: Path
    port: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        if not self.port:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.port = free.getsockname()[1]
        settings = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "yes"]
        self.process = subprocess.Popen(
            ["redis-server", *settings, "--appendfsync", "always", "--dir", str(self.folder)],
            stdout=subprocess.DEVNULL,
        )
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.05)
        raise RuntimeError("redis-server did not start")

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(10)
            self.process = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"


def need_redis() -> None:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    need_redis()
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@dataclass
class Place:
    """One kind of store with nothing in it."""

    kind: str
    store: BudgetStore
    clock: FakeClock
    spec: str
    """How another process opens the same store (``memory`` cannot be)."""
    server_clock: FakeClock = field(default_factory=FakeClock)
    """The Redis server's, which setting the calendar here does not change."""

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.server_clock.advance(seconds)

    def budget(self, **settings: Any) -> Budget:
        return Budget(store=self.store, **settings)


def make_place(kind: str, folder: Path, redis_url: str = "", clock: Any = None) -> Place:
    moving = clock or FakeClock()
    if kind == "memory":
        return Place(kind, MemoryStore(moving), moving, "memory")
    if kind == "sqlite":
        path = folder / f"budget-{next(_names)}.db"
        return Place(kind, SQLiteStore(path, clock=moving), moving, f"sqlite:{path}")
    prefix = f"test-{next(_names)}-{time.monotonic_ns()}"
    server_clock = FakeClock()
    store = RedisStore(
        redis_url, prefix=prefix, timeout_s=10, clock=server_clock if isinstance(moving, FakeClock) else None
    )
    return Place(kind, store, moving, f"redis:{prefix}:{redis_url}", server_clock)


def open_store(spec: str) -> BudgetStore:
    """The store of a place, in another process and on the real clock."""
    kind, _, rest = spec.partition(":")
    if kind == "sqlite":
        return SQLiteStore(rest, wait_s=60)
    prefix, _, url = rest.partition(":")
    return RedisStore(url, prefix=prefix, timeout_s=10)


@pytest.fixture(params=STORES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    url = request.getfixturevalue("redis_server").url if request.param == "redis" else ""
    made = make_place(request.param, tmp_path, url)
    yield made
    made.store.close()


@pytest.fixture(params=SHARED)
def shared_place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A store that processes share, on the real clock."""
    from s2t_agents.budget import SystemClock

    url = request.getfixturevalue("redis_server").url if request.param == "redis" else ""
    made = make_place(request.param, tmp_path, url, clock=SystemClock())
    yield made
    made.store.close()
