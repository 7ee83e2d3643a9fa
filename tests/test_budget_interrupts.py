"""Ctrl-C, a killed task or a jumping clock at the worst line: nothing is spent twice, nothing stays held."""

# ruff: noqa: F811  (fixtures are imported by name)

from __future__ import annotations

import contextlib
import linecache
import sqlite3
import sys
from decimal import Decimal
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from budget_support import ONE, FakeClock, Place, make_place, place, redis_server  # noqa: F401

import s2t_agents.budget as package
from s2t_agents.budget import PER_DAY, Budget, Charge, Hold, SQLiteStore
from s2t_agents.budget import sqlite_store as sqlite_module
from s2t_agents.errors import BudgetExceeded, StoreUnavailable
from s2t_agents.sqlite_file import OwnFile

OURS = str(Path(package.__file__).parent)
COST = Charge(Decimal("0.3"), 10)


class Stop(KeyboardInterrupt):
    """What a test throws at a line."""


class Interrupter:
    """Raises :class:`Stop` when the package's code is about to run its n-th line."""

    def __init__(self, line: int) -> None:
        self.left = line

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        # A signal is never taken where a with block is left (before its __exit__), though tracing stops there.
        source = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip()
        if event == "line" and not source.startswith("with"):
            if self.left == 0:
                self.left = -1
                raise Stop
            self.left -= 1
        return self


def spend_once(budget: Budget, line: int) -> tuple[bool, Hold | None]:
    """Reserve and settle, stopped at a line. Whether it was stopped, and the hold if it was handed out."""
    hold: Hold | None = None
    interrupter = Interrupter(line)
    before = sys.gettrace()
    sys.settrace(interrupter)
    try:
        with budget.reserve(COST, ttl_s=5) as hold:
            hold.settle(COST)
    except Stop:
        return True, hold
    finally:
        sys.settrace(before)
    return interrupter.left == -1, hold


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_stopped_at_any_line_the_books_are_right(kind: str, tmp_path: Path) -> None:
    place = make_place(kind, tmp_path)
    tops = 0
    for line in range(10_000):
        run = place.budget(usd=1, name=f"run-{line}")
        stopped, hold = spend_once(run.child("agent"), line)
        spent = run.state().spent["usd"]
        assert spent in (0, COST.usd), f"at line {line}"
        if hold is not None and hold.actual is not None and not hold.open:
            assert spent == COST.usd, f"a cost was lost at line {line}"
        place.advance(6)
        for budget in (run, run.child("agent")):
            state = budget.state()
            assert state.holds == 0, f"a hold leaked at line {line}"
            assert state.held.get("usd", 0) == 0
            assert state.spent["usd"] == spent
        run.reserve(Charge(Decimal(1) - (spent or 0), escalations=0)).release()  # and it still works
        tops = line
        if not stopped:
            break
    assert tops > 60  # it really went through reserve and settle


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_a_cost_handed_to_settle_is_booked_although_settling_was_stopped(kind: str, tmp_path: Path) -> None:
    place = make_place(kind, tmp_path)
    stops = 0
    for line in range(10_000):
        run = place.budget(usd=1, name=f"run-{line}")
        hold = run.reserve(COST)
        interrupter = Interrupter(line)
        with contextlib.suppress(Stop), hold:
            sys.settrace(interrupter)
            try:
                hold.settle(COST)
            finally:
                sys.settrace(None)
        if interrupter.left != -1:
            break
        stops += 1
        assert run.state().spent["usd"] == (COST.usd if hold.actual else 0), f"at line {line}"
        assert run.state().holds == 0
    assert stops > 20


def test_ctrl_c_between_the_store_and_the_caller_gives_the_hold_back(place: Place, monkeypatch: Any) -> None:
    budget = place.budget(usd=1)
    granted = place.store.reserve

    def interrupted(*args: Any) -> None:
        assert granted(*args) is None
        raise Stop

    monkeypatch.setattr(place.store, "reserve", interrupted)
    with pytest.raises(Stop):
        budget.reserve(COST)
    assert budget.state().holds == 0


class Failing:
    """A connection on which statements fail, once each: before they are run, or after."""

    def __init__(self, connection: Any, before: dict[str, BaseException], after: dict[str, BaseException]) -> None:
        self._connection, self._before, self._after = connection, before, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def execute(self, sql: str, *values: Any) -> Any:
        if sql in self._before:
            raise self._before.pop(sql)
        found = self._connection.execute(sql, *values)
        if sql in self._after:
            raise self._after.pop(sql)
        return found


def failing(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, BaseException], dict[str, BaseException]]:
    """What fails from now on before and after it is run, by statement."""
    before: dict[str, BaseException] = {}
    after: dict[str, BaseException] = {}
    connect = OwnFile.connection
    monkeypatch.setattr(OwnFile, "connection", lambda *given: Failing(connect(*given), before, after))
    return before, after


def test_ctrl_c_again_while_the_first_is_rolled_back_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, _ = failing(monkeypatch)
    budget = make_place("sqlite", tmp_path).budget(usd=1)
    before.update({"COMMIT": Stop(), "ROLLBACK": Stop()})
    with pytest.raises(Stop):
        budget.extend(usd=1)
    assert not before
    assert budget.state().limit["usd"] == 1
    budget.reserve(COST).settle(COST)
    assert (budget.state().holds, budget.state().spent["usd"]) == (0, COST.usd)


def test_a_commit_that_fails_may_have_held_and_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, after = failing(monkeypatch)
    budget = make_place("sqlite", tmp_path).budget(usd=1)
    after["COMMIT"] = sqlite3.OperationalError("disk I/O error")
    with pytest.raises(StoreUnavailable, match="disk"):
        budget.reserve(COST)
    assert not after
    assert budget.state().holds == 0


def test_setting_the_calendar_frees_no_hold_and_moves_no_deadline(tmp_path: Path) -> None:
    for kind in ("memory", "sqlite"):
        place = make_place(kind, tmp_path)
        budget = place.budget(usd=1, seconds=100)
        budget.reserve(Charge(Decimal(1), escalations=0), ttl_s=50)
        for jump in (10**8, -(10**8) * 2):
            place.clock.date += jump
            with pytest.raises(BudgetExceeded):
                budget.reserve(Charge(Decimal("0.1"), escalations=0))
            assert budget.seconds_left() == 100


def test_a_calendar_set_forward_and_back_makes_no_money(place: Place) -> None:
    budget = place.budget(usd=1, window=PER_DAY)
    for _ in range(3):
        place.advance(86_400)
        budget.reserve(Charge(Decimal(1), escalations=0)).settle(Charge(Decimal(1), escalations=0))
        place.advance(-86_400)
        with pytest.raises(BudgetExceeded):
            budget.reserve(Charge(Decimal("0.01"), escalations=0))
        place.advance(86_400)


def test_after_a_reboot_holds_are_free_and_deadlines_go_on(tmp_path: Path, monkeypatch: Any) -> None:
    clock = FakeClock(mono=5_000_000.0)
    store = SQLiteStore(tmp_path / "b.db", clock=clock)
    budget = Budget(usd=1, seconds=1_000, store=store)
    late = budget.reserve(Charge(Decimal("0.4"), escalations=0), ttl_s=900)
    budget.reserve(Charge(Decimal("0.2"), escalations=0)).settle(Charge(Decimal("0.2"), escalations=0))
    store.close()

    monkeypatch.setattr(sqlite_module, "boot_id", lambda: "another boot")
    rebooted = FakeClock(mono=12.0, date=clock.date + 300)
    again = Budget(usd=1, seconds=1_000, store=SQLiteStore(tmp_path / "b.db", clock=rebooted))
    state = again.state()
    assert state.holds == 0
    assert state.spent["usd"] == Decimal("0.2")
    assert again.seconds_left() == pytest.approx(700, abs=1)
    assert late.open


def test_after_a_reboot_what_was_held_is_there_again_and_so_is_more_time(tmp_path: Path, monkeypatch: Any) -> None:
    clock = FakeClock(mono=5_000_000.0)
    store = SQLiteStore(tmp_path / "b.db", clock=clock)
    budget = Budget(usd=1, seconds=1_000, store=store)
    budget.reserve(Charge(Decimal("0.9"), escalations=0), ttl_s=900)
    budget.extend(seconds=500)
    store.close()

    monkeypatch.setattr(sqlite_module, "boot_id", lambda: "another boot")
    rebooted = FakeClock(mono=12.0, date=clock.date + 300)
    again = Budget(usd=1, seconds=1_000, store=SQLiteStore(tmp_path / "b.db", clock=rebooted))
    assert again.seconds_left() == pytest.approx(1_200, abs=1)
    again.reserve(Charge(Decimal(1), escalations=0))


def test_without_a_boot_id_the_clock_is_held_against_the_last_time_the_file_was_opened(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(sqlite_module, "boot_id", lambda: "")
    for mono, holds in ((100.0, 0), (5_000.0, 1), (1_000.0, 0)):
        budget = Budget(usd=1, store=SQLiteStore(tmp_path / "b.db", clock=FakeClock(mono=mono)))
        assert budget.state().holds == holds
        if not holds:
            budget.reserve(ONE, ttl_s=90_000)


def test_without_a_boot_id_a_clock_that_went_back_tells_of_the_reboot(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sqlite_module, "boot_id", lambda: "")
    first = Budget(usd=1, store=SQLiteStore(tmp_path / "b.db", clock=FakeClock(mono=5_000.0)))
    first.reserve(ONE, ttl_s=900)
    again = Budget(usd=1, store=SQLiteStore(tmp_path / "b.db", clock=FakeClock(mono=1.0)))
    assert again.state().holds == 0
