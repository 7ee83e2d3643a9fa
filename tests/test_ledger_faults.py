"""Ledger faults: a failed write is a warning and a mark, not a failed answer; reading changes nothing."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core.caches import InMemoryCache
from langchain_core.messages import AIMessage

from s2t_agents import ChatS2T, Ledger
from s2t_agents.errors import LedgerError
from s2t_agents.ledger import Cost, GenerationRecord, Latency, sqlite
from s2t_agents.ledger.report import report
from s2t_agents.testing import tiny_model

TOKENS = 6


class Broken(Ledger):
    """A ledger of the caller's own may raise anything."""

    def record(self, rec: GenerationRecord) -> None:
        raise KeyError("no such table")


def removed(folder: Path) -> Ledger:
    (folder / "gone").mkdir()
    ledger = Ledger.open(folder / "gone" / "costs.jsonl")
    shutil.rmtree(folder / "gone")
    return ledger


def full_device(folder: Path) -> Ledger:
    ledger = Ledger.open(folder / "costs.jsonl")
    (folder / "costs.jsonl").unlink()
    (folder / "costs.jsonl").symlink_to("/dev/full")
    return ledger


def closed(folder: Path) -> Ledger:
    ledger = Ledger.open(folder / "costs.db")
    ledger.close()
    return ledger


def locked(folder: Path) -> Ledger:
    from s2t_agents.ledger.sqlite import SQLiteLedger

    other = sqlite3.connect(folder / "costs.db", isolation_level=None, check_same_thread=False)
    ledger = Ledger(SQLiteLedger(folder / "costs.db", wait_s=0.05))
    other.execute("BEGIN EXCLUSIVE")
    locked.kept = other  # type: ignore[attr-defined]
    return ledger


def corrupt(folder: Path) -> Ledger:
    ledger = Ledger.open(folder / "costs.db")
    with (folder / "costs.db").open("r+b") as file:
        file.write(b"\xff" * os.path.getsize(folder / "costs.db"))
    return ledger


def replaced(folder: Path) -> Ledger:
    ledger = Ledger.open(folder / "costs.jsonl")
    (folder / "costs.jsonl").write_text("dear diary\n")
    return ledger


FAULTS = [lambda folder: Broken(), removed, full_device, closed, locked, corrupt, replaced]


@pytest.fixture(params=FAULTS, ids=lambda make: make.__name__.strip("<>"))
def broken(request: pytest.FixtureRequest, tmp_path: Path) -> Ledger:
    made: Ledger = request.param(tmp_path)
    return made


def chat(ledger: Ledger, **other: Any) -> ChatS2T:
    return ChatS2T(model=tiny_model(), max_tokens=TOKENS, ledger=ledger, **other)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [entry.message for entry in caplog.records if entry.levelno == logging.WARNING and "ledger" in entry.message]


async def test_the_answer_stands_and_is_marked_however_it_is_asked_for(
    broken: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    model = chat(broken)
    text = chat(Ledger()).invoke("hello").content
    chunks = list(model.stream("hello"))
    later = [chunk async for chunk in model.astream("hello")]
    answers: list[AIMessage] = [
        model.invoke("hello"),
        await model.ainvoke("hello"),
        sum(chunks[1:], chunks[0]),
        sum(later[1:], later[0]),
        *model.batch(["hello"] * 2),
    ]
    assert {answer.content for answer in answers} == {text}
    assert all(answer.response_metadata["s2t"]["ledger_error"] for answer in answers)
    assert len(told(caplog)) == 1  # not at every answer


def test_an_answer_whose_record_is_kept_has_no_mark() -> None:
    assert "ledger_error" not in chat(Ledger()).invoke("hello").response_metadata["s2t"]


def test_the_generations_own_error_comes_out_and_leaving_early_is_quiet(broken: Ledger) -> None:
    def fail(trace: str, step: Any) -> None:
        raise LookupError("own")

    with pytest.raises(LookupError, match="own"):
        chat(broken, on_step=fail).invoke("hello")
    stream = chat(broken).stream("hello")
    next(stream)
    stream.close()  # type: ignore[attr-defined]


def test_an_answer_from_the_cache_stands_too(caplog: pytest.LogCaptureFixture) -> None:
    model = chat(Broken(), cache=InMemoryCache())
    first, again = model.invoke("hello"), model.invoke("hello")
    assert again.content == first.content
    assert "no such table" in again.response_metadata["s2t"]["ledger_error"]
    model.ledger = Ledger()
    assert "ledger_error" not in model.invoke("hello").response_metadata["s2t"]


def test_each_reason_is_told_once_for_each_ledger(caplog: pytest.LogCaptureFixture) -> None:
    for ledger in (Broken(), Broken()):
        for _ in range(3):
            chat(ledger).invoke("hello")
    assert len(told(caplog)) == 2


def test_a_running_total_counts_what_the_file_did_not_take(tmp_path: Path) -> None:
    ledger = removed(tmp_path)
    with ledger.scope() as running:
        chat(ledger).invoke("hello")
    assert running.now.generations == 1


FILL = """
import os, resource, sys
from s2t_agents.errors import LedgerError
from s2t_agents.ledger import GenerationRecord, Ledger

for limit in (0, 1, 400):
    path = f"{sys.argv[1]}/{limit}.jsonl"
    ledger = Ledger.open(path)
    ledger.record(GenerationRecord(agent="before"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(path) + limit, resource.RLIM_INFINITY))
    for _ in range(3):
        try:
            ledger.record(GenerationRecord(agent="lost", model="m" * 5000))
        except LedgerError:
            continue
        raise SystemExit("it was written")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    ledger.record(GenerationRecord(agent="after"))
    assert [record.agent for record in ledger.records()] == ["before", "after"]
    assert b"torn" not in open(path, "rb").read()
"""


def test_records_are_kept_again_when_there_is_room_again(tmp_path: Path) -> None:
    done = forked.run("-c", FILL, str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_a_full_file_system(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        ledgers = [Ledger.open(tmp_path / "costs.jsonl"), Ledger.open(tmp_path / "costs.db")]
        with (tmp_path / "junk").open("wb", buffering=0) as junk:
            try:
                while junk.write(b"x" * 512):
                    pass
            except OSError:
                pass
        for ledger in ledgers:
            marks = ["ledger_error" in chat(ledger).invoke("hello").response_metadata["s2t"] for _ in range(12)]
            assert marks[-1]
        (tmp_path / "junk").unlink()
        for ledger in ledgers:
            chat(ledger).invoke("hello")
            assert ledger.records()
            ledger.close()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_ledger_that_cannot_be_written_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    (tmp_path / "full.jsonl").symlink_to("/dev/full")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("full.jsonl", "pipe.jsonl", "folder.jsonl", "nowhere/costs.jsonl", "nowhere/costs.db"):
        with pytest.raises(LedgerError):
            Ledger.open(tmp_path / name)


def test_a_file_that_another_process_keeps_locked_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    import fcntl

    from s2t_agents.ledger.jsonl import JsonlLedger

    ledger = Ledger(JsonlLedger(tmp_path / "costs.jsonl", wait_s=0.05))
    with (tmp_path / "costs.jsonl").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(LedgerError, match="locked"):
            ledger.record(GenerationRecord())
    ledger.record(GenerationRecord())
    assert len(ledger.records()) == 1


@pytest.mark.parametrize("name", ["costs.jsonl", "costs.db"])
def test_a_record_waits_until_another_writer_is_done(tmp_path: Path, name: str) -> None:
    import fcntl

    path = tmp_path / name
    ledger = Ledger.open(path)
    if name.endswith("db"):
        other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        done = other.close
    else:
        file = path.open("ab")
        fcntl.flock(file, fcntl.LOCK_EX)
        done = file.close
    timer = threading.Timer(0.2, done)
    timer.start()
    ledger.record(GenerationRecord())
    timer.join()
    assert len(ledger.records()) == 1


# ---------------------------------------------------------------------- torn lines


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(st.lists(st.integers(0, 60) | st.integers(0, 900), min_size=1, max_size=8))
def test_power_cuts_wherever_they_come_lose_only_what_was_not_whole(tmp_path: Path, cuts: list[int]) -> None:
    path = tmp_path / "costs.jsonl"
    path.unlink(missing_ok=True)
    Ledger.open(path)
    kept: list[tuple[str, int]] = []  # agents, and where their lines end but for the newline
    for number, cut in enumerate(cuts):
        agent = f"{number} ü€"
        before = path.stat().st_size
        Ledger.open(path).record(GenerationRecord(agent=agent, error='{"torn": 3}'))
        kept.append((agent, path.stat().st_size - 1))
        os.truncate(path, max(path.stat().st_size - cut, min(before, 19)))
        kept = [(name, end) for name, end in kept if end <= path.stat().st_size]
        read = [record.agent for record in Ledger.reading(path).records()]
        assert read == [name for name, _ in kept]
    Ledger.open(path).record(GenerationRecord(agent="last"))
    assert [record.agent for record in Ledger.open(path).records()] == [*(name for name, _ in kept), "last"]


@pytest.mark.parametrize("length", range(19))
def test_a_torn_header_is_completed(tmp_path: Path, length: int) -> None:
    path = tmp_path / "costs.jsonl"
    path.write_bytes(b'{"s2t_ledger": 1}\n'[:length])
    assert Ledger.reading(path).records() == []
    assert path.stat().st_size == length
    Ledger.open(path).record(GenerationRecord(agent="first"))
    assert [record.agent for record in Ledger.open(path).records()] == ["first"]


def test_a_stream_that_the_garbage_collector_ends_inside_an_append_has_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    ledger = Ledger.open(tmp_path / "costs.jsonl")
    lock, inside = fcntl.flock, list[str]()

    def meddled(*args: Any) -> None:
        lock(*args)
        if not inside:
            inside.append("an append")
            ledger.record(GenerationRecord(agent="lost"))  # as a finalizer would, in this very thread

    monkeypatch.setattr(fcntl, "flock", meddled)
    done = threading.Thread(target=ledger.record, args=(GenerationRecord(agent="own"),), daemon=True)
    done.start()
    done.join(20)
    assert [record.agent for record in ledger.records()] == ["own", "lost"]


# ---------------------------------------------------------------------- reading

GOOD = GenerationRecord(agent="good", cost_usd=Cost(local="0.5", llm=1), latency_ms=Latency(total=3)).model_dump_json()  # type: ignore[arg-type]
BAD = {
    "1e999": GOOD.replace('"0.5"', '"1e999"'),
    "digits": GOOD.replace('"0.5"', f'"{"9" * 5000}"'),
    "exponent": GOOD.replace('"0.5"', '"1e-99999999999999999999"'),
    "nan": GOOD.replace('"0.5"', '"NaN"'),
    "infinity": GOOD.replace('"total":3.0', '"total":"-Infinity"'),
    "bare nan": GOOD.replace('"total":3.0', '"total":NaN'),
    "late": GOOD.replace('"total":3.0', '"total":1e308'),
    "count": GOOD.replace('"prompt_tokens":0', f'"prompt_tokens":{"9" * 400}'),
    "negative": GOOD.replace('"prompt_tokens":0', '"prompt_tokens":-1'),
    "text": GOOD.replace('"prompt_tokens":0', '"prompt_tokens":"many"'),
    "no moment": GOOD.replace('"started_at":"2', '"started_at":"x'),
    "no utc": '{"started_at":"9999-12-31T23:59:59-12:00"}',
    "deep": '{"budget":' + '{"a":' * 5000 + "1" + "}" * 5001,
    "surrogate": GOOD.replace('"good"', '"\\ud800"'),
    "nul": GOOD.replace('"good"', '"go\0od"'),
    "list": "[]",
    "number": "1",
    "unknown": '{"tokens":1}',
    "receipts": '{"receipts":[7]}',
    "outcome": '{"receipts":[{"step":1,"prefix_tokens":1,"outcome":"won"}]}',
    "garbage": "\x01\x02",
    "half": GOOD.replace('"agent":', '"agent"'),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("ending", ["\n", "", "\n" + GOOD + "\n"])
def test_a_line_that_is_no_record_is_told_by_its_number(tmp_path: Path, what: str, ending: str) -> None:
    if not ending and what in ("nul", "garbage", "bare nan", "half", "deep", "surrogate"):
        pytest.skip("without an end of line it may be a torn one")
    path = tmp_path / "costs.jsonl"
    path.write_text('{"s2t_ledger": 1}\n' + GOOD + "\n" + BAD[what] + ending)
    with pytest.raises(LedgerError, match="line 3, is not a record"):
        report(Ledger.reading(path))


def test_bytes_that_are_no_text_are_told_by_their_number(tmp_path: Path) -> None:
    path = tmp_path / "costs.jsonl"
    path.write_bytes(b'{"s2t_ledger": 1}\n' + GOOD.encode().replace(b"good", b"\xff\xfe") + b"\n")
    with pytest.raises(LedgerError, match="line 2, is not a record"):
        report(Ledger.reading(path))


@pytest.mark.parametrize("value", [b"\xff\xfe", "[]", 3, BAD["1e999"], BAD["no utc"], ""])
def test_a_row_that_is_no_record_is_told_by_its_number(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "costs.db"
    ledger = Ledger.open(path)
    ledger.record(GenerationRecord())
    ledger.close()
    with sqlite3.connect(path) as file:
        file.execute("INSERT INTO records (id, started_at, agent, record) VALUES ('x', '', '', ?)", (value,))
    file.close()
    with pytest.raises(LedgerError, match="record 2 cannot be read"):
        report(Ledger.reading(path))


def state(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.db", "costs.jsonl", "costs.db"])
def test_a_report_changes_nothing(tmp_path: Path, name: str) -> None:
    if name.startswith("empty"):
        (tmp_path / name).touch()
    else:
        ledger = Ledger.open(tmp_path / name)
        ledger.record(GenerationRecord())
        ledger.close()
    before = state(tmp_path)
    for format in ("table", "json", "csv"):
        assert report(tmp_path / name, format=format)  # type: ignore[arg-type]
    assert state(tmp_path) == before
    with pytest.raises(LedgerError, match="opened to be read"):
        Ledger.reading(tmp_path / name).record(GenerationRecord())


def test_a_report_beside_a_living_writer(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path / "costs.db")
    for _ in range(3):
        ledger.record(GenerationRecord())
    before = set(state(tmp_path))
    assert Ledger.reading(tmp_path / "costs.db").total().generations == 3
    assert set(state(tmp_path)) == before
    reading = sqlite.read_records(tmp_path / "costs.db")
    next(reading)
    ledger.record(GenerationRecord())  # a reader in the middle blocks no writer
    assert len(list(reading)) == 2


def read_only(folder: Path) -> Iterator[Path]:
    view = folder / "view"
    view.mkdir()
    for step in (["mount", "--bind", folder / "data", view], ["mount", "-o", "remount,ro,bind", view]):
        if subprocess.run(step, capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
    try:
        yield view
    finally:
        subprocess.run(["umount", view], check=True)


@pytest.mark.parametrize("living", [False, True])
@pytest.mark.parametrize("name", ["costs.jsonl", "costs.db"])
def test_a_report_from_a_folder_that_cannot_be_written(tmp_path: Path, name: str, living: bool) -> None:
    (tmp_path / "data").mkdir()
    ledger = Ledger.open(tmp_path / "data" / name)
    ledger.record(GenerationRecord())
    if not living:
        ledger.close()
    for view in read_only(tmp_path):
        assert Ledger.reading(view / name).total().generations == 1
        if not living:
            with pytest.raises(LedgerError):
                Ledger.open(view / name)
        ledger.close()  # SQLite gives a file back when no connection of the process holds it


def copied_beside_a_writer(folder: Path, *endings: str) -> Path:
    """A ledger of three records, copied while its writer has it open: its log is not yet in the file."""
    (folder / "own").mkdir()
    (folder / "data").mkdir()
    ledger = Ledger.open(folder / "own" / "costs.db")
    for _ in range(3):
        ledger.record(GenerationRecord())
    for ending in endings:
        shutil.copy(folder / "own" / f"costs.db{ending}", folder / "data")
    ledger.close()
    return folder / "data" / "costs.db"


LEFT = [("", "-wal"), ("", "-wal", "-shm")]


@pytest.mark.parametrize("endings", LEFT, ids=" ".join)
def test_a_copied_log_is_read_and_nothing_is_made_beside_it(tmp_path: Path, endings: tuple[str, ...]) -> None:
    path = copied_beside_a_writer(tmp_path, *endings)
    before = state(path.parent)
    assert Ledger.reading(path).total().generations == 3
    assert set(state(path.parent)) == set(before)
    assert state(path.parent)["costs.db"] == before["costs.db"]
    assert state(path.parent)["costs.db-wal"] == before["costs.db-wal"]


@pytest.mark.parametrize("endings", LEFT, ids=" ".join)
def test_a_copied_log_is_read_in_a_folder_that_cannot_be_written(tmp_path: Path, endings: tuple[str, ...]) -> None:
    copied_beside_a_writer(tmp_path, *endings)
    for view in read_only(tmp_path):
        assert Ledger.reading(view / "costs.db").total().generations == 3


def test_no_room_for_the_copy_of_a_log_is_told_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied_beside_a_writer(tmp_path, "", "-wal")

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sqlite, "copyfile", full)
    with pytest.raises(LedgerError, match=r"without its -shm file.*No space left.*TMPDIR"):
        Ledger.reading(path).total()


def test_a_sound_file_that_cannot_be_read_now_is_not_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "costs.db"
    Ledger.open(path).close()
    path.with_name("costs.db-wal").mkdir()
    with pytest.raises(LedgerError) as told:
        Ledger.reading(path).total()
    assert "damaged" not in str(told.value)


# ---------------------------------------------------------------------- size


def test_a_report_takes_no_memory_for_records(tmp_path: Path) -> None:
    import tracemalloc

    def peak(records: int) -> int:
        path = tmp_path / f"{records}.jsonl"
        path.write_text('{"s2t_ledger": 1}\n' + (GOOD + "\n") * records)
        tracemalloc.start()
        report(Ledger.reading(path), format="json")
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    small, large = peak(500), peak(4000)
    assert large - small < 3500 * 100  # of 700 bytes each


def test_more_groups_than_memory_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from s2t_agents.ledger import grouped_totals

    ledger = Ledger()
    for number in range(100):
        ledger.record(GenerationRecord(run_id=str(number)))
    assert len(ledger.totals("run")) == 100
    monkeypatch.setattr(grouped_totals, "GROUPS_BYTES", 50 * grouped_totals.GROUP_BYTES)
    with pytest.raises(LedgerError, match=r"by='run' makes more than 4\d groups.*Group by agent or day"):
        ledger.totals("run")


def test_a_table_of_many_groups_adds_the_rest_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from s2t_agents.ledger import report as module

    monkeypatch.setattr(module, "ROWS", 3)
    ledger = Ledger()
    for number in range(8):
        ledger.record(GenerationRecord(run_id=f"run{number}", completion_tokens=1))
    text = module.report(ledger, "run", width=200)
    assert "run2" in text
    assert "run3" not in text
    [others] = [line for line in text.splitlines() if "(5 others: see --csv)" in line]
    assert " 0/5 " in others
    assert module.report(ledger, "run", "csv").count("\n") == 9
