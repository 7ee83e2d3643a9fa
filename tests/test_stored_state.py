"""What earlier code left on disk and on servers is read as it was meant.

The files in ``stored/`` were written by commit ac28c48: a budget tree fleet > day > agent with settled charges, one of
them above its hold, an open and a lapsed hold and an extension; a budget that settled a charge of unknown price; and
two records with four receipts.
"""

# ruff: noqa: F811  (fixtures are imported by name)

from __future__ import annotations

import base64
import json
import pickle
import shutil
from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import pytest
import redis
from budget_support import FakeClock, RedisServer, redis_server  # noqa: F401

from s2t_agents import Ledger
from s2t_agents.budget import PER_DAY, Budget, BudgetStore, Charge, RedisStore, SQLiteStore, sqlite_store
from s2t_agents.errors import BudgetExceeded
from s2t_agents.types import RefusedBy

STORED = Path(__file__).parent / "stored"
CENT = Charge(Decimal("0.01"), llm_tokens=5)


@pytest.fixture
def clock() -> FakeClock:
    """Two seconds after the first reservation."""
    return FakeClock(mono=1_002.0, date=1_800_000_002.0)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sqlite_store, "boot_id", lambda: "the boot of the file")
    return Path(shutil.copy(STORED / "budget.db", tmp_path))


@pytest.fixture
def server(redis_server: RedisServer) -> RedisServer:
    content = json.loads((STORED / "budget-redis.json").read_text())
    client = redis.Redis.from_url(redis_server.url)
    for key, fields in content["hashes"].items():
        client.delete(key)
        client.hset(key, mapping={base64.b64decode(name): base64.b64decode(value) for name, value in fields.items()})
    for key, members in content["sets"].items():
        client.delete(key)
        client.zadd(key, {base64.b64decode(member): score for member, score in members.items()})
    client.close()
    return redis_server


@pytest.fixture(params=["sqlite", "redis"])
def store(request: pytest.FixtureRequest, clock: FakeClock) -> Iterator[BudgetStore]:
    opened: BudgetStore
    if request.param == "sqlite":
        opened = SQLiteStore(request.getfixturevalue("file"), clock=clock)
    else:
        opened = RedisStore(request.getfixturevalue("server").url, prefix="old", timeout_s=5, clock=clock)
    yield opened
    opened.close()


def tree_in(store: BudgetStore) -> tuple[Budget, Budget, Budget]:
    """Opened with the limits that it was made with, which must be those that are stored."""
    reserve = Charge(Decimal("0.1"), llm_tokens=10, escalations=2)
    limits = {"usd": 1, "escalations": 50, "llm_tokens": 1000, "seconds": 3600, "reserve_for_final": reserve}
    fleet = Budget(name="fleet", store=store, **limits)  # type: ignore[arg-type]
    day = fleet.child("day", usd="0.5", window=PER_DAY)
    return fleet, day, day.child("agent", escalations=20)


def test_a_stored_tree_takes_limits_on_local_work(store: BudgetStore) -> None:
    _, _, agent = tree_in(store)
    helper = agent.child("helper", answers=2, answer_tokens=100)
    one = Charge(Decimal(0), escalations=0, answers=1, answer_tokens=60)
    helper.reserve(one).settle(one)
    with pytest.raises(BudgetExceeded, match="limit 100, spent 60"):
        helper.reserve(one)
    before = agent.state()
    assert (before.spent["answers"], before.spent["answer_tokens"]) == (1, 60)
    agent.reserve(CENT).settle(CENT)  # a meter from before, with what came since
    assert agent.state().spent["answers"] == 1
    assert agent.state().spent["escalations"] == before.spent["escalations"] + 1  # type: ignore[operator]


def test_every_figure_of_a_stored_budget_is_read(store: BudgetStore) -> None:
    fleet, day, agent = (budget.state() for budget in tree_in(store))
    assert fleet.limit == {"usd": Decimal("1.25"), "escalations": 55, "llm_tokens": 1000, "seconds": 3660}
    assert fleet.spent == {"usd": Decimal("0.065"), "escalations": 4, "llm_tokens": 24, "seconds": 2}
    assert fleet.held == {"usd": Decimal("0.02"), "escalations": 1, "llm_tokens": 7, "seconds": 0}
    assert fleet.left == {"usd": Decimal("1.165"), "escalations": 50, "llm_tokens": 969, "seconds": 3658}
    assert fleet.kept == {"usd": Decimal("0.1"), "escalations": 2, "llm_tokens": 10}
    assert fleet.overrun == day.overrun == agent.overrun == {"usd": Decimal("0.025"), "llm_tokens": 4}
    assert (day.limit, day.left) == ({"usd": Decimal("0.5")}, {"usd": Decimal("0.415")})
    assert (agent.limit, agent.left, agent.holds) == ({"escalations": 20}, {"escalations": 15}, 1)
    other = Budget(escalations=3, name="other", store=store).state()
    assert (other.spent["usd"], other.spent["llm_tokens"], other.unpriced) == (None, 4, 1)


def test_a_stored_budget_goes_on(store: BudgetStore) -> None:
    fleet, _, agent = tree_in(store)
    agent.reserve(CENT).settle(CENT)
    assert fleet.state().spent["usd"] == Decimal("0.075")
    assert not fleet.extend(escalations=9, once="a grant")  # it was granted then
    fleet.reserve(Charge(Decimal("1.055"), escalations=0)).release()
    with pytest.raises(BudgetExceeded, match=r"kept for a last answer 0\.1"):
        fleet.reserve(Charge(Decimal("1.0551"), escalations=0))


def pickled(name: str, **places: str) -> Budget:
    content = (STORED / name).read_bytes()
    for place, value in places.items():
        content = content.replace(f"@{place}@".encode(), value.encode())
    budget: Budget = pickle.loads(content)
    return budget


def test_a_pickled_budget_on_sqlite_is_read(file: Path) -> None:
    last = pickled("budget-sqlite.pickle", PATH=str(file))
    assert (last.path, last.on_exhausted, last.windowed, last.in_dollars) == ("fleet/day/agent", "raise", True, True)
    assert [budget.name for budget in last.chain] == ["fleet", "day", "agent"]
    assert "final" in repr(last)
    assert last.state().spent["escalations"] == 4
    again: Budget = pickle.loads(pickle.dumps(last))
    assert (again.path, again.state(), repr(again)) == (last.path, last.state(), repr(last))


def test_a_pickled_budget_on_redis_is_read(server: RedisServer) -> None:
    agent = pickled("budget-redis.pickle", PORT=str(server.port))
    assert (agent.path, agent.on_exhausted) == ("fleet/day/agent", "raise")
    assert agent.state().limit == {"escalations": 20}


def test_a_stored_hold_lapses_when_it_would_have(store: BudgetStore, clock: FakeClock) -> None:
    fleet = tree_in(store)[0]
    clock.advance(990)
    assert fleet.state().holds == 1
    clock.advance(10)
    state = fleet.state()
    assert (state.holds, state.held["usd"], state.spent["usd"]) == (0, 0, Decimal("0.065"))


@pytest.mark.parametrize("name", ["ledger.jsonl", "ledger.db"])
def test_a_stored_ledger_is_read_and_written_back_as_it_was(tmp_path: Path, name: str) -> None:
    path = shutil.copy(STORED / name, tmp_path)
    first, second = Ledger.reading(path).records()
    picked, refused, failed, replayed = first.receipts
    assert picked.reserved == Charge(Decimal("0.0110"), llm_tokens=32)
    assert picked.actual == Charge(Decimal("0.0102"), llm_tokens=31)
    assert (refused.reserved, refused.actual) == (Charge(None, llm_tokens=34), None)
    assert refused.refused_by == RefusedBy("fleet/run", "usd", Decimal("0.011"))
    assert failed.actual == Charge(None, llm_tokens=35)
    assert replayed.actual == Charge(Decimal(0), escalations=0)
    assert (second.cost_usd.local, second.cost_usd.total, second.error) == (None, None, "KeyError")
    assert second.started_at == datetime.fromisoformat("2026-11-28T00:00:00Z")
    lines = (STORED / "ledger.jsonl").read_text().splitlines()[1:]
    assert [record.model_dump_json() for record in (first, second)] == lines
    assert Ledger.open(path).total().cost_usd.llm.known == Decimal("0.0102")


def test_amounts_of_version_0_1_are_charges() -> None:
    with pytest.warns(DeprecationWarning, match="Charge"):
        from s2t_agents.budget import Amount
    assert Amount(Decimal("0.1"), 2, 30) == Charge(Decimal("0.1"), llm_tokens=30, escalations=2)
    assert Amount(llm_tokens=3) == Charge(llm_tokens=3, escalations=0)
