"""A budget file that is not ours, damaged or taken away: a clear error, the file untouched, nothing spent."""

from __future__ import annotations

import sqlite3
from decimal import Decimal
from pathlib import Path

import pytest

from s2t_agents.budget import Budget, Charge, SQLiteStore
from s2t_agents.errors import BadStore, StoreUnavailable

CENT = Charge(Decimal("0.01"), escalations=0)


def filled(path: Path, meters: int = 60) -> Path:
    store = SQLiteStore(path)
    for number in range(meters):
        Budget(usd=1, name=f"run-{number}", store=store).reserve(CENT).settle(CENT)
    store.close()
    return path


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "photos.db"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE photos (name)")
    other.close()
    before = path.read_bytes()
    with pytest.raises(BadStore, match="another program"):
        SQLiteStore(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"hello", b"{}" * 500, b"SQLite format 3\0", b"SQLite format 3\0" + b"\xff" * 5000]
)
def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.db"
    path.write_bytes(content)
    with pytest.raises(BadStore, match=r"not a SQLite file|cut off|another program"):
        SQLiteStore(path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_a_damaged_file_is_left_alone(tmp_path: Path, damage: str) -> None:
    path = filled(tmp_path / "budget.db")
    whole = path.read_bytes()
    broken = whole[: len(whole) // 2] if damage == "cut" else whole[:4096] + b"\x55" * 8192 + whole[12288:]
    path.write_bytes(broken)
    with pytest.raises(BadStore, match="damaged"):
        SQLiteStore(path)
    assert path.read_bytes() == broken


def test_a_later_format_is_left_alone(tmp_path: Path) -> None:
    path = filled(tmp_path / "budget.db", 1)
    with sqlite3.connect(path) as later:
        later.execute("PRAGMA user_version=99")
    later.close()
    with pytest.raises(BadStore, match="format 99"):
        SQLiteStore(path)


def test_places_that_can_not_be(tmp_path: Path) -> None:
    with pytest.raises(BadStore, match="no directory"):
        SQLiteStore(tmp_path / "nowhere" / "budget.db")
    with pytest.raises(BadStore, match="not a file"):
        SQLiteStore(tmp_path)


def test_an_empty_file_becomes_a_store(tmp_path: Path) -> None:
    path = tmp_path / "budget.db"
    path.touch()
    budget = Budget(usd=1, store=SQLiteStore(path))
    budget.reserve(CENT).settle(CENT)
    assert budget.state().spent["usd"] == CENT.usd


def test_a_file_taken_away_refuses_everything(tmp_path: Path) -> None:
    path = tmp_path / "budget.db"
    budget = Budget(usd=1, store=SQLiteStore(path))
    for name in tmp_path.iterdir():
        name.rename(name.with_name("moved-" + name.name))
    with pytest.raises(StoreUnavailable, match="removed or replaced"):
        budget.reserve(CENT)
    filled(path, 1)  # and a new file in its place is not ours either
    with pytest.raises(StoreUnavailable, match="removed or replaced"):
        budget.reserve(CENT)


def test_a_relative_path_means_the_place_where_it_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    budget = Budget(usd=1, store=SQLiteStore("budget.db"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    budget.reserve(CENT).settle(CENT)
    assert Budget(usd=1, store=SQLiteStore(tmp_path / "budget.db")).state().spent["usd"] == CENT.usd


def test_a_file_locked_for_too_long_refuses_and_the_cost_is_booked_later(tmp_path: Path) -> None:
    path = tmp_path / "budget.db"
    budget = Budget(usd=1, store=SQLiteStore(path, wait_s=0.05))
    hold = budget.reserve(CENT)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked"):
        budget.reserve(CENT)
    with pytest.raises(StoreUnavailable, match="locked"):
        hold.settle(CENT)
    assert not hold.open
    other.execute("ROLLBACK")
    other.close()
    budget.reserve(CENT).release()
    assert budget.state().spent["usd"] == CENT.usd
    assert budget.state().holds == 0


def test_spending_outlives_the_process_that_spent(tmp_path: Path) -> None:
    path = filled(tmp_path / "budget.db", 1)
    again = Budget(usd=1, name="run-0", store=SQLiteStore(path))
    assert again.state().spent["usd"] == CENT.usd
