"""Ledger files outlive a killed writer, and other people's files outlive us."""

from __future__ import annotations

import csv
import io
import json
import pickle
import random
import re
import sqlite3
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from s2t_agents.errors import LedgerError
from s2t_agents.ledger import Cost, GenerationRecord, Latency, Ledger
from s2t_agents.ledger.report import report

WRITER = """
import os, sys
from s2t_agents.ledger import GenerationRecord, Ledger
ledger = Ledger.open(sys.argv[1])
noted = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
print("ready", flush=True)
while True:
    ledger.record(GenerationRecord(agent="a" * 3000))
    os.write(noted, b"x")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["costs.jsonl", "costs.db"])
def test_a_killed_writer_loses_at_most_the_record_in_flight(tmp_path: Path, name: str) -> None:
    path, noted, dice = tmp_path / name, tmp_path / "noted", random.Random(1)
    kills = 0
    for _ in range(2):
        writers = [
            subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(noted)], stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
        for writer in writers:
            time.sleep(dice.random() * 0.2)
            writer.kill()
            writer.wait(10)
            kills += 1
    ledger = Ledger.open(path)
    kept = len(ledger.records())
    assert noted.stat().st_size > 0
    assert noted.stat().st_size <= kept <= noted.stat().st_size + kills
    ledger.record(GenerationRecord(agent="after"))
    assert Ledger.open(path).records()[-1].agent == "after"


EDITS = {
    "line ends": lambda read: read.replace(b"\n", b"\r\n"),
    "line ends and a last line without": lambda read: read.replace(b"\n", b"\r\n")[:-2],
    "blank lines": lambda read: read.replace(b"\n", b"\n\r\n \t\n"),
    "joined with an empty one": lambda read: read + read[: read.index(b"\n") + 1],
    "joined with an edited one": lambda read: read + read[: read.index(b"\n")] + b"\r\n",
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_what_editors_and_cat_do_to_a_file_loses_no_record(tmp_path: Path, edit: Any) -> None:
    path = tmp_path / "costs.jsonl"
    for agent in ("ann", "bob"):
        Ledger.open(path).record(GenerationRecord(agent=agent))
    path.write_bytes(edit(path.read_bytes()))
    assert [record.agent for record in Ledger.reading(path).records()] == ["ann", "bob"]
    Ledger.open(path).record(GenerationRecord(agent="eve"))
    assert [agent for agent, *_ in Ledger.reading(path).grouped("agent")] == ["ann", "bob", "eve"]


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_a_torn_line_is_stepped_over_and_sealed(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "costs.jsonl"
    ledger = Ledger.open(path)
    ledger.record(GenerationRecord(agent="first"))
    ledger.record(GenerationRecord(agent="torn"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    left = ["first", "torn"] if cut == 1 else ["first"]  # only its newline is missing: nothing is lost
    assert [record.agent for record in Ledger.open(path).records()] == left
    for agent in ("next", "last"):
        Ledger.open(path).record(GenerationRecord(agent=agent))
    assert [record.agent for record in Ledger.open(path).records()] == [*left, "next", "last"]
    assert path.read_bytes().startswith(whole[:-cut])  # nothing that was there is gone


@pytest.mark.parametrize("left", [b"\n", b'\n{"to'])
def test_a_writer_killed_between_a_torn_line_and_its_seal_loses_nothing_more(tmp_path: Path, left: bytes) -> None:
    path = tmp_path / "costs.jsonl"
    for agent in ("first", "torn"):
        Ledger.open(path).record(GenerationRecord(agent=agent))
    path.write_bytes(path.read_bytes()[:-40] + left)
    for agent in ("next", "last"):
        Ledger.open(path).record(GenerationRecord(agent=agent))
    assert [record.agent for record in Ledger.reading(path)] == ["first", "next", "last"]


def test_corruption_is_said_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "costs.jsonl"
    ledger = Ledger.open(path)
    for agent in ("one", "two", "three"):
        ledger.record(GenerationRecord(agent=agent))
    path.write_bytes(path.read_bytes().replace(b'"two"', b'"two'))
    with pytest.raises(LedgerError, match="line 3, is not a record"):
        ledger.records()


@pytest.mark.parametrize("name", ["costs.jsonl", "costs.db"])
@pytest.mark.parametrize("content", [b"dear diary\n", b'{"role": "user"}\n', b"SQLite format 3\0" + b"\0" * 200])
def test_another_file_is_left_alone(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(LedgerError, match="not a"):
        Ledger.open(path)
    assert path.read_bytes() == content


def agents(ledger: Ledger) -> list[str]:
    return [record.agent for record in ledger.records()]


def test_json_lines_may_be_rotated_while_they_are_written(tmp_path: Path) -> None:
    path, moved = tmp_path / "costs.jsonl", tmp_path / "costs.1.jsonl"
    ledger = Ledger.open(path)
    ledger.record(GenerationRecord(agent="before"))
    path.rename(moved)
    for agent in ("after", "later"):
        ledger.record(GenerationRecord(agent=agent))
    assert agents(ledger) == agents(Ledger.open(path)) == ["after", "later"]
    assert agents(Ledger.open(moved)) == ["before"]
    path.write_bytes(b"")  # copied and truncated, as logrotate's copytruncate does
    ledger.record(GenerationRecord(agent="last"))
    assert agents(ledger) == agents(Ledger.open(path)) == ["last"]


def test_a_foreign_file_put_in_the_place_of_json_lines_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "costs.jsonl"
    ledger = Ledger.open(path)
    path.write_text("dear diary\n")
    for use in (lambda: ledger.record(GenerationRecord()), ledger.records):
        with pytest.raises(LedgerError, match="not a ledger of JSON lines"):
            use()
    assert path.read_text() == "dear diary\n"


@pytest.mark.parametrize("replaced", [False, True])
def test_a_database_taken_away_is_said_and_nothing_is_kept_in_the_void(tmp_path: Path, replaced: bool) -> None:
    path = tmp_path / "costs.db"
    ledger = Ledger.open(path)
    ledger.record(GenerationRecord(agent="before"))
    for file in tmp_path.glob("costs.db*"):
        file.rename(tmp_path / f"moved-{file.name}")
    if replaced:
        Ledger.open(path).close()
    for use in (lambda: ledger.record(GenerationRecord(agent="after")), ledger.records):
        with pytest.raises(LedgerError, match="removed or replaced"):
            use()
    assert path.exists() == replaced
    assert agents(Ledger.open(tmp_path / "moved-costs.db")) == ["before"]


@pytest.mark.parametrize("name", ["costs.jsonl", "costs.db"])
def test_a_relative_path_means_the_place_where_it_was_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    ledger = Ledger.open(name)
    ledger.record(GenerationRecord(agent="before"))
    pickled = pickle.dumps(ledger)
    monkeypatch.chdir(tmp_path / "elsewhere")
    ledger.record(GenerationRecord(agent="after"))
    pickle.loads(pickled).record(GenerationRecord(agent="copy"))
    assert agents(Ledger.open(tmp_path / name)) == ["before", "after", "copy"]
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_another_database_and_a_damaged_ledger_are_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "photos.db"
    with sqlite3.connect(other) as photos:
        photos.execute("CREATE TABLE photos (name)")
    photos.close()
    damaged = tmp_path / "costs.db"
    ledger = Ledger.open(damaged)
    for _ in range(50):
        ledger.record(GenerationRecord(agent="x" * 500))
    ledger.close()
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    for path in (other, damaged):
        before = path.read_bytes()
        with pytest.raises(LedgerError, match=r"another program|damaged"):
            Ledger.open(path)
        assert path.read_bytes() == before


def test_places_that_can_not_be_written(tmp_path: Path) -> None:
    for name in ("costs.jsonl", "costs.db"):
        with pytest.raises(LedgerError):
            Ledger.open(tmp_path / "nowhere" / name)


def test_a_record_can_not_be_kept_twice_in_sqlite(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path / "costs.db")
    record = GenerationRecord()
    ledger.record(record)
    with pytest.raises(LedgerError, match="UNIQUE"):
        ledger.record(record)


@pytest.fixture(params=["costs.jsonl", "costs.db"])
def filled(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / request.param
    ledger = Ledger.open(path)
    known = Cost(local=Decimal("0.001"), llm=Decimal("0.02"))
    ledger.record(GenerationRecord(agent="planner", escalations=2, cost_usd=known, latency_ms=Latency(total=10)))
    ledger.record(GenerationRecord(agent="planner", cost_usd=known, latency_ms=Latency(total=30, ttft=5)))
    ledger.record(GenerationRecord(agent="=[bold]\x1b[2J", cost_usd=Cost(local=Decimal("0.001"))))
    ledger.close()
    return path


def test_a_ledger_that_is_written_while_it_is_read_says_so(tmp_path: Path) -> None:
    path = tmp_path / "costs.db"
    for _ in range(2):
        ledger = Ledger.open(path)
        ledger.record(GenerationRecord())
        ledger.close()
    reading = iter(Ledger.reading(path))
    next(reading)
    ledger = Ledger.open(path)
    ledger.record(GenerationRecord())
    ledger.close()  # what it wrote is in the file itself
    with pytest.raises(LedgerError, match="written to while it was read"):
        list(reading)
    assert len(list(Ledger.reading(path))) == 3


def test_the_report_as_json(filled: Path) -> None:
    said = json.loads(report(Ledger.reading(filled), "agent", "json"))
    assert said["groups"]["planner"]["cost_usd"]["total"]["usd"] == "0.042"
    assert said["groups"]["planner"]["latency_ms"]["total"] == {"count": 2, "p50": 10.0, "p95": 30.0, "p99": 30.0}
    assert said["total"]["cost_usd"]["total"] == {"known": "0.042", "unknown": 1, "usd": None}
    assert said["total"]["generations"] == 3


def test_the_report_as_csv(filled: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(report(Ledger.reading(filled), "agent", "csv"))))
    assert rows[0]["agent"] == "planner"
    assert rows[0]["total_usd"] == "0.042"
    assert rows[0]["total_p95_ms"] == "30.0"
    assert rows[1]["agent"].startswith("'=")
    assert (rows[1]["total_usd"], rows[1]["unknown_costs"]) == ("", "1")


@pytest.mark.parametrize(
    ("ms", "told"), [(12.000000000000043, "12.0"), (0.1 + 0.2, "0.3"), (0.0004, "0.0"), (1234.56789, "1234.568")]
)
def test_the_times_in_the_csv_are_whole_microseconds(ms: float, told: str) -> None:
    [row] = csv.DictReader(io.StringIO(report(only(latency_ms=Latency(total=ms, propose=ms)), format="csv")))
    assert {row[f"{part}_p{share}_ms"] for part in ("total", "propose") for share in (50, 95, 99)} == {told}


def test_the_report_as_a_table(filled: Path) -> None:
    text = report(Ledger.reading(filled), "agent", width=220)
    assert "planner" in text
    assert "0.042000 + 1?" in text  # the sum says that it does not know everything
    assert "=[bold]" in text
    assert "\x1b[2J" not in text


def only(**fields: Any) -> Ledger:
    ledger = Ledger()
    ledger.record(GenerationRecord(**fields))
    return ledger


@pytest.mark.parametrize("name", ["\\[/x]", "[/x]", "[bold]", "\\\\[red]x", ":smile:", "a\\"])
def test_a_name_in_the_report_is_text_whatever_it_looks_like(name: str) -> None:
    assert name in report(only(agent=name), width=220)


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\t", "\r", "\n", "\t="])
def test_a_name_in_the_csv_is_neither_a_formula_nor_the_end_of_a_row(first: str) -> None:
    [row] = csv.DictReader(io.StringIO(report(only(agent=f"{first}1+1"), format="csv"), newline=""))
    assert row["agent"] == (f"'{first}1+1" if first in "=+-@" else "�" + first[1:] + "1+1")


def test_the_table_explains_its_question_marks_and_counts_errors() -> None:
    free = Cost(local=Decimal(0), llm=Decimal(0))
    plain = report(only(cost_usd=free))
    assert "unknown" not in plain
    assert "errors" not in plain
    unknown = report(only(cost_usd=Cost(llm=Decimal(0))))
    assert "0 + 1?" in unknown
    assert "n?: the cost of n answers is unknown. Set device_price." in unknown
    assert "Set device_price and the LLM's price." in report(only())
    failed = report(only(cost_usd=free, error="StoreUnavailable: down"))
    assert "errors" in failed
    assert re.search(r"total .* 1 .* 0/0/0 .* 1 ", failed)


AGENTS = ["researcher", "writer", "summariser-of-documents", "東京の記者", "x" * 90]
SIZES = {
    "small": {"prompt_tokens": 3, "completion_tokens": 1},
    "unknown costs": {"prompt_tokens": 2_000, "selections": 12, "cost_usd": Cost(llm=Decimal("0.123456"))},
    "large": {
        "prompt_tokens": 41_234_567,
        "completion_tokens": 2_345_678,
        "selections": 123_456,
        "flips": 12_345,
        "escalations": 12_345,
        "refused": 1_234,
        "error": "StoreUnavailable: down",
        "latency_ms": Latency(total=1_234_567.8),
        "cost_usd": Cost(local=Decimal("23.456789"), llm=Decimal("1234.567891")),
    },
}


@pytest.mark.parametrize("width", [None, 1, 40, 80, 100, 120, 121, 160, 500])
@pytest.mark.parametrize("fields", SIZES.values(), ids=SIZES)
def test_a_table_cuts_no_figure_and_no_name_however_wide_it_is(
    fields: dict[str, Any], width: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "__stdout__", io.StringIO())  # no terminal: a pipe
    ledger = Ledger()
    for agent in AGENTS:
        ledger.record(GenerationRecord(agent=agent, **fields))
    shown = report(ledger, width=width)
    sums = ledger.totals()["writer"]
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown
    for agent in AGENTS[:4]:
        assert agent in shown
    assert shown.count("x") >= 90
    spent = sums.cost_usd
    for cost in (spent.local, spent.llm, spent.total):
        figure = f"{cost.known:.6f}" if cost.known else "0"
        assert (f"{figure} + {cost.unknown}?" if cost.unknown else figure) in shown
    assert f"{sums.prompt_tokens:,}/{sums.completion_tokens:,}" in shown
    assert f"{sums.escalations:,}/{sums.refused:,}/0" in shown
    widest = max(cell_len(line) for line in shown.splitlines())
    if width is None:
        assert shown.count("Costs by agent") == 1
    elif width >= 120:
        assert widest <= width


@pytest.mark.parametrize("columns", [100, 120])
def test_a_narrow_terminal_gets_the_columns_below_each_other(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    ledger = Ledger()
    ledger.record(GenerationRecord(agent="writer", **SIZES["large"]))
    shown = report(ledger)
    assert max(map(len, shown.splitlines())) <= columns
    assert shown.count("writer") == shown.count("Costs by agent") > 1


def test_a_report_on_nothing(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="no such ledger"):
        report(Ledger.reading(tmp_path / "none.jsonl"))
    assert not (tmp_path / "none.jsonl").exists()
    empty = tmp_path / "empty.jsonl"
    Ledger.open(empty)
    assert "total" in report(Ledger.reading(empty))
    with pytest.raises(LedgerError, match="xml"):
        report(Ledger.reading(empty), format="xml")  # type: ignore[arg-type]
