"""Files that something else has written to, and files that others keep busy: errors by name, answers that go on."""

from __future__ import annotations

import random
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from s2t_agents import ChatS2T, Escalation
from s2t_agents.budget import PER_DAY, Budget, Charge, SQLiteStore, SystemClock, sqlite_store
from s2t_agents.errors import BadStore, ConfigError, S2TError, StoreUnavailable
from s2t_agents.testing import ScriptedLLM, last_candidate, tiny_model
from s2t_agents.triggers import always

ONE = Charge(Decimal("0.01"), 5)


def tree_in(store: SQLiteStore) -> Budget:
    root = Budget(usd=1, escalations=50, name="fleet", store=store)
    return root.child("day", usd="0.5", window=PER_DAY).child("agent", escalations=20, seconds=3600)


def write_tree(path: Path) -> Path:
    """A file with everything in it: settled, held and lapsed, grants, windows, deadlines."""
    store = SQLiteStore(path, wait_s=0.2)
    agent = tree_in(store)
    for _ in range(3):
        agent.reserve(ONE).settle(ONE)
    agent.reserve(ONE, ttl_s=0.001)
    agent.reserve(ONE)
    agent.extend(escalations=1, once="grant")
    time.sleep(0.002)
    agent.state()
    store.close()
    return path


def use(path: Path) -> None:
    """Everything that a budget does."""
    store = SQLiteStore(path, wait_s=0.2)
    agent = tree_in(store)
    steps: list[Callable[[], Any]] = [
        lambda: agent.reserve(ONE).settle(ONE),
        lambda: agent.reserve(ONE).release(),
        agent.state,
        agent.available,
        agent.seconds_left,
        lambda: agent.extend(escalations=1, once="grant"),
        lambda: agent.extend(seconds=1),
        lambda: agent.child("new", escalations=1).reserve(ONE),
    ]
    problems = []
    for step in steps:
        try:
            step()
        except S2TError as error:
            problems.append(error)
    store.close()
    if problems:
        raise problems[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_tree(tmp_path_factory.mktemp("whole") / "budget.db").read_bytes()


def flipped(content: bytes, dice: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(dice.choice([1, 1, 2, 5, 20, 200])):
        damaged[dice.randrange(len(damaged))] = dice.randrange(256)
    return bytes(damaged)


def shuffled(content: bytes, dice: random.Random) -> bytes:
    pages = [content[at : at + 4096] for at in range(0, len(content), 4096)]
    rest = pages[1:]
    dice.shuffle(rest)
    return b"".join([pages[0], *rest])


def retyped(content: bytes, dice: random.Random) -> bytes:
    """A run of bytes in other letters: names, paths, JSON and statements of the schema."""
    words = [b"meters", b"holds", b"CREATE", b"INTEGER", b"fleet", b"day", b"agent", b'["', b"machine", b"CHECK"]
    return content.replace(dice.choice(words), dice.randbytes(4), dice.choice([1, -1]))


DAMAGES = {
    "bytes": flipped,
    "cut": lambda content, dice: content[: dice.randrange(len(content))],
    "longer": lambda content, dice: content + dice.randbytes(dice.randrange(1, 9000)),
    "pages": shuffled,
    "words": retyped,
}


def damaged_is_named(path: Path) -> bool:
    """Whether it was found out; what cannot be seen (another digit in a number) works."""
    try:
        use(path)
    except S2TError:
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damage_is_a_bare_error(whole: bytes, tmp_path: Path, damage: str) -> None:
    dice = random.Random(damage)
    found = 0
    for n in range(120):
        path = tmp_path / f"{n}.db"
        path.write_bytes(DAMAGES[damage](whole, dice))
        found += damaged_is_named(path)
    assert found > 5 or damage == "longer"  # SQLite does not read what lies behind its last page


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["-wal", "-journal", "-shm"])
def test_leftovers_of_other_files_are_no_bare_error(whole: bytes, tmp_path: Path, suffix: str) -> None:
    dice = random.Random(suffix)
    for n in range(40):
        path = tmp_path / f"{n}.db"
        path.write_bytes(whole)
        leftover = dice.choice([whole, dice.randbytes(5000), b"", flipped(whole, dice)])
        Path(f"{path}{suffix}").write_bytes(leftover)
        damaged_is_named(path)


@pytest.mark.slow
def test_damage_in_the_middle_is_no_bare_error(whole: bytes, tmp_path: Path) -> None:
    dice = random.Random(3)
    for n in range(120):
        path = tmp_path / f"{n}.db"
        path.write_bytes(whole)
        store = SQLiteStore(path, wait_s=0.2)
        agent = tree_in(store)
        hold = agent.reserve(ONE)
        for file in (path, Path(f"{path}-wal")):  # in place: it stays the same file
            content = file.read_bytes() if file.exists() else b""
            if content:
                with file.open("r+b") as open_file:
                    open_file.write(flipped(content, dice))
        for step in (lambda a=agent: a.reserve(ONE), lambda h=hold: h.settle(ONE), agent.state):
            try:
                step()
            except S2TError:
                continue
        store.close()


SQL = [
    *("UPDATE holds SET chain = '{', expires_us = 0", "UPDATE holds SET chain = '7', expires_us = 0"),
    *("UPDATE holds SET chain = '[1]', expires_us = 0", "UPDATE holds SET chain = x'ff', expires_us = 0"),
    *("UPDATE holds SET usd = 'x', expires_us = 0", "UPDATE holds SET usd = 1e300, expires_us = 0"),
    *("UPDATE meters SET spent_usd = 'x'", "UPDATE meters SET spent_usd = 1.5", "UPDATE meters SET spent_usd = -5"),
    *("UPDATE meters SET spent_usd = x'00'", "UPDATE meters SET limit_escalations = 'many'"),
    *("UPDATE meters SET limit_usd = -1", "UPDATE meters SET keep_usd = -1000000000000000"),
    *("UPDATE meters SET deadline_us = 'soon'", "UPDATE meters SET window = 'w'", "UPDATE meters SET window_s = 0"),
    *("UPDATE meters SET over_tokens = 9e99", "UPDATE meters SET held_usd = -1"),
    *("DROP TABLE holds", "DROP TABLE meters", "ALTER TABLE meters DROP COLUMN limit_us"),
    *("ALTER TABLE meters ADD COLUMN more", "ALTER TABLE holds DROP COLUMN chain"),
    *("ALTER TABLE meters RENAME TO others", "DROP TABLE meters; CREATE VIEW meters AS SELECT 1"),
    "CREATE TRIGGER t BEFORE UPDATE ON meters BEGIN SELECT RAISE(ABORT, 'no'); END",
]


def change(path: Path, sql: str) -> None:
    other = sqlite3.connect(path)
    other.execute("PRAGMA ignore_check_constraints = ON")
    other.executescript(sql)
    other.commit()
    other.close()


@pytest.mark.parametrize("sql", SQL)
def test_other_contents_are_a_bad_store_in_the_middle_and_when_opened_again(
    whole: bytes, tmp_path: Path, sql: str
) -> None:
    path = tmp_path / "budget.db"
    path.write_bytes(whole)
    store = SQLiteStore(path, wait_s=0.2)
    agent = tree_in(store)
    hold = agent.reserve(ONE)
    change(path, sql)
    for step in (lambda: agent.reserve(ONE), lambda: hold.settle(ONE)):
        with pytest.raises(BadStore, match="damaged") as caught:
            step()
        assert not caught.value.retryable
    store.close()
    with pytest.raises(S2TError) as again:
        use(path)
    assert isinstance(again.value, ConfigError)


@pytest.mark.parametrize("sql", [SQL[0], SQL[6], "DROP TABLE meters", "DROP TABLE holds"])
@pytest.mark.parametrize("mode", ["degrade", "raise", "ask"])
def test_damage_in_the_middle_of_an_answer_costs_the_llm_not_the_answer(
    whole: bytes, tmp_path: Path, sql: str, mode: Any
) -> None:
    path = tmp_path / "budget.db"
    path.write_bytes(whole)

    def answers(ids: Sequence[int], candidates: Sequence[int]) -> list[float]:
        if len(llm.asked) == 2:
            change(path, sql)
        return last_candidate(ids, candidates)

    llm = ScriptedLLM(answers)
    budget = Budget(escalations=50, name="own", store=SQLiteStore(path), on_exhausted=mode)
    chat = ChatS2T(model=tiny_model(), escalation=Escalation(llm, margin=1.0), trigger=always(), max_tokens=6)
    said = chat.invoke("hi", s2t_budget=budget)
    told = said.response_metadata["s2t"]
    assert told["tokens"] == 6
    assert told["degraded"]
    assert told["budget"] is None
    assert told["escalations"] == len(llm.asked) == 2


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tree(tmp_path / "budget.db")

    def denied(self: Path, *args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(BadStore, match="Permission denied"):
        SQLiteStore(path)


# ---------------------------------------------------------------------- busy


class ThreadClock(threading.local):
    """A clock of each thread's own, which only its sleeps move on."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ThreadClock:
    clock = ThreadClock()
    monkeypatch.setattr(sqlite_store, "time", clock)
    return clock


@pytest.mark.parametrize("threads", [1, 12])
def test_every_thread_waits_for_a_busy_file_as_long_as_was_said(
    tmp_path: Path, threads: int, clock: ThreadClock
) -> None:
    budget = Budget(escalations=50, name="busy", store=SQLiteStore(tmp_path / "budget.db", wait_s=0.5))
    holds = [budget.reserve(ONE) for _ in range(threads)]
    other = sqlite3.connect(tmp_path / "budget.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    waited: list[float] = []

    def work(hold: Any) -> None:
        for step in (lambda: budget.reserve(ONE), lambda: hold.settle(ONE), budget.state):
            started = clock.now
            with pytest.raises(StoreUnavailable, match="locked"):
                step()
            waited.append(clock.now - started)

    working = [threading.Thread(target=work, args=(hold,)) for hold in holds]
    for thread in working:
        thread.start()
    for thread in working:
        thread.join()
    other.execute("ROLLBACK")
    other.close()
    assert waited == pytest.approx([0.5] * 3 * threads)
    budget.reserve(ONE).settle(ONE)
    assert budget.state().spent["escalations"] == threads + 1
    assert budget.state().holds == 0


def test_a_file_that_is_let_go_is_used_soon(
    tmp_path: Path, clock: ThreadClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = Budget(escalations=50, name="busy", store=SQLiteStore(tmp_path / "budget.db", wait_s=20))
    other = sqlite3.connect(tmp_path / "budget.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    def sleep(seconds: float) -> None:
        clock.now += seconds
        if clock.now > 0.3 and other.in_transaction:
            other.execute("ROLLBACK")

    monkeypatch.setattr(clock, "sleep", sleep)
    budget.reserve(ONE).settle(ONE)
    assert 0.3 < clock.now < 1
    other.close()


def test_a_busy_file_is_waited_for_when_it_is_opened_too(tmp_path: Path, clock: ThreadClock) -> None:
    path = write_tree(tmp_path / "budget.db")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked"):
        SQLiteStore(path, wait_s=0.4)
    assert clock.now == pytest.approx(0.4)
    other.close()


@pytest.mark.parametrize("wait_s", [0, 0.2])
@pytest.mark.parametrize("step", ["reserve", "settle", "extend", "state", "child"])
def test_a_thread_that_is_long_at_work_is_waited_for_as_long_as_was_said(
    tmp_path: Path, step: str, wait_s: float
) -> None:
    class Stuck(SystemClock):
        def monotonic(self) -> float:  # asked inside a transaction
            if threading.current_thread() is not threading.main_thread():
                inside.set()
                assert go_on.wait(60)
            return super().monotonic()

    inside, go_on = threading.Event(), threading.Event()
    budget = Budget(escalations=50, store=SQLiteStore(tmp_path / "budget.db", wait_s=wait_s, clock=Stuck()))
    hold = budget.reserve(ONE)
    steps: dict[str, Any] = {
        "reserve": lambda: budget.reserve(ONE),
        "settle": lambda: hold.settle(ONE),
        "extend": lambda: budget.extend(escalations=1),
        "state": budget.state,
        "child": lambda: budget.child("child"),
    }
    thread = threading.Thread(target=budget.state)
    thread.start()
    assert inside.wait(60)
    try:
        with pytest.raises(StoreUnavailable, match="locked by another thread"):
            steps[step]()
    finally:
        go_on.set()
        thread.join()
    budget.reserve(ONE).settle(ONE)  # and what is owed
    assert budget.state().spent["escalations"] == (2 if step == "settle" else 1)
    assert budget.state().limit["escalations"] == 50


@pytest.mark.parametrize("wait_s", [-1, float("nan"), float("inf"), 10**9])
def test_a_time_to_wait_that_cannot_be_meant_is_refused(tmp_path: Path, wait_s: float) -> None:
    with pytest.raises(ConfigError, match="wait_s"):
        SQLiteStore(tmp_path / "budget.db", wait_s=wait_s)
