"""Records keep what happened; sums of them agree, exactly, however they are grouped."""

from __future__ import annotations

import asyncio
import contextvars
import csv
import decimal
import io
import json
import sqlite3
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from functools import reduce
from itertools import islice
from operator import add
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from s2t_agents.budget import Budget, Charge, MemoryStore
from s2t_agents.errors import ConfigError, LedgerError
from s2t_agents.ledger import Cost, GenerationRecord, Latency, Ledger, MemoryLedger, Receipt, ReceiptCandidate, Totals
from s2t_agents.ledger.report import report
from s2t_agents.types import RefusedBy

usd = st.one_of(st.none(), st.integers(0, 10**15).map(lambda n: Decimal(n).scaleb(-12)))
millis = st.one_of(st.none(), st.floats(0, 1e6))
records = st.builds(
    GenerationRecord,
    agent=st.sampled_from(["planner", "writer", "critic"]),
    thread_id=st.sampled_from([None, "t1", "t2"]),
    run_id=st.sampled_from([None, "r1"]),
    started_at=st.datetimes(datetime(2026, 1, 1), datetime(2026, 1, 4), timezones=st.just(UTC)),
    prompt_tokens=st.integers(0, 10**6),
    escalations=st.integers(0, 50),
    degraded=st.booleans(),
    error=st.sampled_from([None, "down"]),
    cost_usd=st.builds(Cost, local=usd, llm=usd),
    latency_ms=st.builds(Latency, ttft=millis, total=millis, escalate=millis),
)
FULL = GenerationRecord(
    agent="planner",
    thread_id="t1",
    run_id="r1",
    model="slm",
    llm_model="llm",
    escalations=1,
    refused=1,
    cost_usd=Cost(local=Decimal("0.001"), llm=Decimal("0.000000000001")),
    latency_ms=Latency(total=12.5),
    budget={"left": {"usd": "0.5"}},
    receipts=(
        Receipt(
            step=3,
            prefix_tokens=40,
            candidates=(
                ReceiptCandidate(token_id=1, text=" a", slm=-0.5, selector=-1.0, llm=float("-inf")),
                ReceiptCandidate(token_id=2, text="\n\u2028é", slm=-0.9),
            ),
            wanted=1,
            pick=2,
            outcome="picked",
            reserved=Charge(Decimal("0.2"), 41),
            actual=Charge(Decimal("0.1"), 41),
            wait_ms=3.5,
        ),
        Receipt(
            step=9,
            prefix_tokens=46,
            outcome="refused",
            reserved=Charge(Decimal("0.2"), 47),
            refused_by=RefusedBy("fleet/run", "usd", Decimal("0.30")),
            reason="budget",
        ),
    ),
)
OLD = (
    '{"id":"old","agent":"default","thread_id":null,"run_id":null,"model":"","llm_model":null,'
    '"started_at":"2026-01-01T00:00:00Z","finish_reason":"","prompt_tokens":0,"completion_tokens":0,"triggers":0,'
    '"selections":0,"flips":0,"escalations":0,"refused":0,"degraded":false,"cached":false,'
    '"cost_usd":{"local":null,"llm":null,"total":null},"latency_ms":{"queue":null,"ttft":null,"propose":null,'
    '"select":null,"escalate":null,"grammar":null,"total":null},"budget":null,"receipts":[{"step":1,'
    '"prefix_tokens":9,"candidates":[],"wanted":5,"pick":5,"outcome":"picked","reserved":{"usd":"0.1",'
    '"escalations":1,"llm_tokens":10},"actual":{"usd":"0.1","escalations":1,"llm_tokens":10},"wait_ms":0.0,'
    '"reason":""},{"step":2,"prefix_tokens":9,"candidates":[],"wanted":null,"pick":null,"outcome":"refused",'
    '"reserved":null,"actual":null,"wait_ms":0.0,"reason":""}],"error":null,"trace_id":null}'
)
"""A record as it was written before a receipt said which limit refused."""
KINDS: dict[str, Callable[[Path], Ledger]] = {
    "memory": lambda folder: Ledger(),
    "jsonl": lambda folder: Ledger.open(folder / "costs.jsonl"),
    "sqlite": lambda folder: Ledger.open(str(folder / "costs.db")),
}


@pytest.fixture(params=sorted(KINDS))
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Ledger:
    return KINDS[request.param](tmp_path)


def test_what_is_recorded_is_read_back_whole(ledger: Ledger) -> None:
    ledger.record(FULL)
    ledger.record(GenerationRecord(agent="writer"))
    assert ledger.records(agent="planner", thread_id="t1", run_id="r1") == [FULL]
    assert [record.agent for record in ledger.records()] == ["planner", "writer"]
    assert ledger.records(thread_id="nobody's") == []


def test_what_is_kept_while_records_are_read_is_read_the_next_time(ledger: Ledger) -> None:
    for _ in range(2):
        ledger.record(GenerationRecord())
    read = 0
    for _ in islice(ledger, 9):
        ledger.record(GenerationRecord())
        read += 1
    assert (read, len(ledger.records())) == (2, 4)


def test_text_that_no_file_can_hold_is_kept_escaped(ledger: Ledger) -> None:
    odd = "x\ud800"
    refused = Receipt(
        step=0, prefix_tokens=1, outcome="refused", reason=odd, candidates=(ReceiptCandidate(token_id=1, text=odd),)
    )
    fields = dict.fromkeys(("agent", "thread_id", "run_id", "model", "llm_model", "error"), odd)
    ledger.record(GenerationRecord(receipts=(refused,), **fields))
    [record] = ledger.records()
    assert {getattr(record, name) for name in fields} == {"x\\ud800"}
    assert record.receipts[0].reason == record.receipts[0].candidates[0].text == "x\\ud800"


MOST, LEAST = Decimal(1_000_000), Decimal("0.000000000001")


@pytest.mark.parametrize(
    ("local", "llm"), [(LEAST, MOST), (MOST, LEAST), (MOST, MOST), (MOST, Decimal(0)), (MOST, None)]
)
def test_every_cost_that_is_recorded_is_read_back(ledger: Ledger, local: Decimal, llm: Decimal | None) -> None:
    record = GenerationRecord(cost_usd=Cost(local=local, llm=llm))
    ledger.record(record)
    assert ledger.records() == [record]
    assert ledger.total().cost_usd.total.usd == record.cost_usd.total
    assert GenerationRecord(**record.model_dump()) == record


@pytest.mark.parametrize("usd", [0.0000001, "0.1", 1, Decimal("1e-400"), Decimal("4e6")])
def test_every_charge_that_is_recorded_is_read_back(ledger: Ledger, usd: Any) -> None:
    receipt = Receipt(step=0, prefix_tokens=1, outcome="picked", reserved=Charge(usd), actual=Charge(usd))
    record = GenerationRecord(receipts=(receipt,))
    ledger.record(record)
    assert ledger.records() == [record]
    assert record.receipts[0].actual == Charge(Decimal(str(usd)))


def test_json_keeps_every_digit() -> None:
    text = FULL.model_dump_json()
    assert '"llm":"0.000000000001"' in text
    assert '"llm":"-Infinity"' in text
    assert GenerationRecord.model_validate_json(text) == FULL


@pytest.mark.parametrize(
    ("unit", "limit", "written"),
    [("usd", Decimal("5"), '"5"'), ("escalations", 5, "5"), ("llm_tokens", 0, "0"), ("seconds", 5.0, "5.0")],
)
def test_the_limit_that_refused_is_read_back_in_its_own_kind_of_number(unit: Any, limit: Any, written: str) -> None:
    receipt = Receipt(step=0, prefix_tokens=1, outcome="refused", refused_by=RefusedBy("run", unit, limit))
    text = receipt.model_dump_json()
    assert f'"refused_by":{{"budget":"run","unit":"{unit}","limit":{written}}}' in text
    again = Receipt.model_validate_json(text).refused_by
    assert again == receipt.refused_by
    assert type(again.limit) is type(limit)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["costs.jsonl", "costs.db"])
def test_a_ledger_written_before_receipts_said_who_refused_is_read_and_rehearsed(kind: str, tmp_path: Path) -> None:
    if kind == "costs.jsonl":
        (tmp_path / kind).write_text('{"s2t_ledger": 1}\n' + OLD + "\n")
    else:
        Ledger.open(tmp_path / kind).close()
        with sqlite3.connect(tmp_path / kind) as file:
            insert = "INSERT INTO records (id, started_at, agent, record) VALUES ('old', '2026-01-01', 'default', ?)"
            file.execute(insert, (OLD,))
    ledger = Ledger.open(tmp_path / kind)
    [record] = ledger.records()
    assert [(r.outcome, r.reserved is None, r.refused_by) for r in record.receipts] == [
        ("picked", False, None),
        ("refused", True, None),
    ]
    assert ledger.what_if(Budget()).unknown == 1
    ledger.record(FULL)
    assert ledger.records(agent="planner") == [FULL]


def total_of_one(record: GenerationRecord) -> Totals:
    ledger = Ledger()
    ledger.record(record)
    return ledger.total()


@given(st.lists(records, max_size=12), st.sampled_from(["agent", "thread", "run", "day"]), st.integers(1, 28))
def test_any_grouping_adds_up_to_the_sum_of_the_records(made: list[GenerationRecord], by: Any, precision: int) -> None:
    ledger = Ledger()
    for record in made:
        ledger.record(record)
    with decimal.localcontext() as context:  # the caller's decimal settings change nothing
        context.prec = precision
        groups = ledger.totals(by)
    assert reduce(add, groups.values(), Totals()) == ledger.total() == reduce(add, map(total_of_one, made), Totals())
    total = ledger.total()
    known = [record.cost_usd.total for record in made if record.cost_usd.total is not None]
    with decimal.localcontext() as context:
        context.prec = 60
        assert total.cost_usd.total.known == sum(known, Decimal(0))
    assert total.cost_usd.total.unknown == len(made) - len(known)
    assert (total.cost_usd.total.usd is None) == (len(known) < len(made))
    assert total.escalations == sum(record.escalations for record in made)


@given(records, records, records)
def test_totals_add_in_any_order(a: GenerationRecord, b: GenerationRecord, c: GenerationRecord) -> None:
    x, y, z = map(total_of_one, (a, b, c))
    assert (x + y) + z == x + (y + z) == z + y + x
    assert sum([x, y]) == x + y


def test_unknown_costs_stay_unknown_and_are_counted(ledger: Ledger) -> None:
    ledger.record(GenerationRecord(cost_usd=Cost(local=Decimal("0.5"), llm=None)))
    ledger.record(GenerationRecord(cost_usd=Cost(local=Decimal("0.5"), llm=Decimal(1))))
    cost = ledger.total().cost_usd
    assert (cost.local.usd, cost.llm.usd, cost.total.usd) == (Decimal("1.0"), None, None)
    assert (cost.total.known, cost.total.unknown) == (Decimal("1.5"), 1)


def test_answers_from_the_cache_are_free_and_not_timed(ledger: Ledger) -> None:
    ledger.record(GenerationRecord(cached=True, prompt_tokens=9, latency_ms=Latency(total=0.1)))
    total = ledger.total()
    assert (total.cached, total.prompt_tokens, total.cost_usd.total.usd) == (1, 9, 0)
    assert ledger.latency() == {"default": {}}
    with pytest.raises(ValidationError, match="cache costs nothing"):
        GenerationRecord(cached=True, cost_usd=Cost(local=Decimal(1)))


def test_sums_of_any_size_are_exact(ledger: Ledger) -> None:
    most = Decimal(1_000_000)
    for _ in range(11):  # more pico-dollars than 64 bits hold
        ledger.record(GenerationRecord(cost_usd=Cost(local=Decimal(0), llm=most)))
    ledger.record(GenerationRecord(cost_usd=Cost(local=Decimal("0.000000000001"), llm=Decimal(0))))
    for sums in (ledger.total(), ledger.totals()["default"]):
        assert sums.cost_usd.total.usd == 11 * most + Decimal("0.000000000001")


def test_failures_and_refusals_count(ledger: Ledger) -> None:
    failed = Receipt(step=0, prefix_tokens=5, outcome="failed", reason="timeout")
    ledger.record(GenerationRecord(receipts=(failed,), refused=2, error="cancelled"))
    total = ledger.total()
    assert (total.failed, total.refused, total.errors) == (1, 2, 1)


def test_percentiles_are_values_that_occurred(ledger: Ledger) -> None:
    for ms in range(1, 101):
        ledger.record(GenerationRecord(latency_ms=Latency(total=float(ms), select=None)))
    split = ledger.latency()["default"]
    assert (split["total"].count, split["total"].p50, split["total"].p95, split["total"].p99) == (100, 50, 95, 99)
    assert "select" not in split


def test_days_are_utc_days(ledger: Ledger) -> None:
    late = datetime(2026, 3, 1, 23, 30, tzinfo=timezone(-timedelta(hours=2)))
    ledger.record(GenerationRecord(started_at=late))
    assert list(ledger.totals("day")) == ["2026-03-02"]
    assert list(ledger.totals("thread")) == ["(none)"]


@pytest.mark.parametrize("by", ["thread", "run"])
def test_no_name_is_taken_for_none(by: Any) -> None:
    ledger = Ledger()
    for name in (None, "", "(none)", '"(none)"', '"', "none", None):
        ledger.record(GenerationRecord(**{f"{by}_id": name}))
    groups = {"(none)": 2, "": 1, '"(none)"': 1, '""(none)""': 1, '"': 1, "none": 1}
    assert {key: sums.generations for key, sums in ledger.totals(by).items()} == groups
    told = json.loads(report(ledger, by, "json"))["groups"]
    assert {key: group["generations"] for key, group in told.items()} == groups
    rows = csv.DictReader(io.StringIO(report(ledger, by, "csv")))
    assert {row[by]: int(row["generations"]) for row in rows} == groups


@pytest.mark.parametrize("store", ["costs.db", Path("costs.jsonl"), b"costs.db", "", [], {}, Ledger, 0, False])
def test_what_is_no_store_is_refused_with_the_way_to_open_a_file(store: Any) -> None:
    with pytest.raises(ConfigError, match=r"this is no store.*Ledger\.open\(path\)"):
        Ledger(store)


def test_a_store_that_counts_as_false_while_it_is_empty_is_used() -> None:
    class Counting(MemoryLedger):
        def __len__(self) -> int:
            return sum(1 for _ in self)

    store = Counting()
    Ledger(store).record(GenerationRecord())
    assert len(store) == 1

    class Meters(MemoryStore):
        def __len__(self) -> int:
            return len(self._meters)

    meters = Meters()
    assert Budget(escalations=1, name="own", store=meters).state().left["escalations"] == 1
    assert len(meters) == 1


ODD: list[Any] = [float("nan"), float("inf"), float("-inf"), "NaN", "Infinity", "-inf", "sNaN"]
OUT_OF_DIGITS: list[Any] = [10**400, "1e999999999", "1e-999999999"]
REFUSED = {"step": 0, "prefix_tokens": 1, "outcome": "refused"}


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt_tokens": -1},
        {"started_at": datetime(2026, 1, 1)},
        {"cost_usd": {"local": -1}},
        {"cost_usd": {"local": "NaN"}},
        {"cost_usd": {"local": 1, "llm": 1, "total": 3}},
        {"cost_usd": {"local": 1, "llm": None, "total": 1}},
        {"latency_ms": {"total": float("nan")}},
        {"latency_ms": {"total": -1}},
        {"id": ""},
        {"tokens": 3},
        *({"steps": [{"token": 1, "by": "slm", "entropy": odd}]} for odd in ODD),
        *({"budget": {"limit": {"usd": odd}}} for odd in ODD if isinstance(odd, float)),
        *({"budget": {"left": [{"a": (0, odd)}]}} for odd in ODD if isinstance(odd, float)),
        *({"budget": {"path": path}} for path in ([], ["x"], {}, 1, True)),
        *({"stopped_by": {"budget": "b", "unit": "usd", "limit": odd}} for odd in (*ODD, *OUT_OF_DIGITS)),
        *({"receipts": [{**REFUSED, "refused_by": {"budget": "b", "unit": "usd", "limit": odd}}]} for odd in ODD),
    ],
)
def test_records_that_can_not_be(bad: dict[str, Any]) -> None:
    with pytest.raises((ValidationError, ValueError)):
        GenerationRecord(**bad)
    assert Cost(local=Decimal(1), llm=0.1, total="1.1").total == Decimal("1.1")  # type: ignore[call-arg, arg-type]


def test_an_agent_reads_its_own_running_total(ledger: Ledger) -> None:
    ledger.record(GenerationRecord(escalations=5))
    with ledger.scope() as outer:
        ledger.record(GenerationRecord(escalations=1))
        with ledger.scope() as inner:
            ledger.record(GenerationRecord(escalations=2))
            assert inner.now.escalations == 2
        Ledger().record(GenerationRecord(escalations=100))
        assert outer.now.escalations == 3
    ledger.record(GenerationRecord(escalations=50))
    assert outer.now.escalations == 3
    assert ledger.total().escalations == 58


async def test_scopes_follow_tasks_and_do_not_mix(ledger: Ledger) -> None:
    async def agent(calls: int) -> int:
        with ledger.scope() as running:
            for _ in range(calls):
                await asyncio.sleep(0)
                await asyncio.to_thread(ledger.record, GenerationRecord())
            return running.now.generations

    assert await asyncio.gather(agent(1), agent(4), agent(2)) == [1, 4, 2]


def test_many_threads_record_at_once(ledger: Ledger) -> None:
    with ledger.scope() as running:

        def work() -> None:
            for _ in range(20):
                ledger.record(GenerationRecord(escalations=1, cost_usd=Cost(local="0.1", llm=0)))  # type: ignore[arg-type]

        threads = [threading.Thread(target=contextvars.copy_context().run, args=(work,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert running.now == ledger.total()
    assert ledger.total().cost_usd.total.usd == 16


def picked(step: int, wanted: int, pick: int) -> Receipt:
    cost = Charge(Decimal("0.1"), 10)
    return Receipt(step=step, prefix_tokens=9, wanted=wanted, pick=pick, outcome="picked", reserved=cost, actual=cost)


def test_what_if_replays_receipts_under_another_budget(ledger: Ledger) -> None:
    ledger.record(GenerationRecord(id="one", receipts=(picked(1, 5, 5), picked(2, 5, 5), picked(3, 5, 6))))
    enough = ledger.what_if(Budget(escalations=3))
    assert (enough.allowed, enough.refused, enough.exact) == (3, 0, True)
    assert enough.spent == Charge(Decimal("0.3"), 30, escalations=3)
    tighter = ledger.what_if(Budget(usd="0.25"))
    assert (tighter.allowed, tighter.newly_refused, tighter.changed_picks) == (2, 1, 1)
    assert tighter.first_change == ("one", 3)
    assert not tighter.exact


def test_what_if_is_approximate_after_the_first_changed_pick(ledger: Ledger) -> None:
    ledger.record(GenerationRecord(id="one", receipts=(picked(1, 5, 6), picked(2, 5, 5))))
    ledger.record(GenerationRecord(id="two", receipts=(picked(1, 5, 5),)))
    none = ledger.what_if(Budget(escalations=0))
    assert (none.refused, none.approximate, none.first_change) == (3, 2, ("one", 1))
    assert none.spent == Charge(Decimal(0), escalations=0)


def test_what_if_allows_what_was_refused_and_does_not_know_the_pick(ledger: Ledger) -> None:
    ledger.record(FULL)
    more = ledger.what_if(Budget(usd=1))
    assert (more.newly_allowed, more.changed_picks, more.exact) == (1, 1, False)
    assert more.spent.usd == Decimal("0.3")
    unknown = Receipt(step=0, prefix_tokens=3, outcome="refused")
    ledger.record(GenerationRecord(receipts=(unknown,)))
    assert ledger.what_if(Budget(usd=1)).unknown == 1


def test_what_if_uses_the_whole_chain_and_spends_nothing(ledger: Ledger) -> None:
    run = Budget(escalations=1)
    agent = run.child("agent", escalations=5)
    ledger.record(GenerationRecord(receipts=(picked(1, 5, 5), picked(2, 5, 5))))
    assert ledger.what_if(agent).allowed == 1
    assert run.state().spent["escalations"] == 0


@pytest.mark.parametrize("raised", ["root", "child", "both"])
@pytest.mark.parametrize("unit", ["usd", "escalations", "llm_tokens", "seconds"])
def test_what_if_goes_by_the_limits_as_they_are_now(ledger: Ledger, raised: str, unit: str) -> None:
    one = {"usd": Decimal("0.1"), "escalations": 1, "llm_tokens": 10, "seconds": 10}[unit]
    budgets = [Budget(**{unit: one if raised != "child" else 2 * one})]
    budgets.append(budgets[0].child("agent", **{unit: one if raised != "root" else 2 * one}))
    for budget in budgets:
        if budget.state().limit[unit] == one:
            budget.extend(**{unit: one})
    start = datetime(2026, 1, 1, tzinfo=UTC)
    for at in (0, 12, 24):
        ledger.record(GenerationRecord(started_at=start + timedelta(seconds=at), receipts=(picked(1, 5, 5),)))
    again = ledger.what_if(budgets[-1])
    assert (again.allowed, again.refused) == (2, 1)
    assert ledger.what_if(budgets[-1].fresh()) == again


@pytest.mark.parametrize("outcome", ["failed", "interrupted"])
def test_what_if_spends_nothing_on_a_question_that_cost_nothing(ledger: Ledger, outcome: Any) -> None:
    cost = Charge(Decimal("0.1"), 10)
    unpaid = Receipt(step=1, prefix_tokens=9, outcome=outcome, reserved=cost)
    ledger.record(GenerationRecord(receipts=(unpaid, unpaid, picked(3, 5, 5))))
    again = ledger.what_if(Budget(usd="0.1", escalations=1))
    assert (again.allowed, again.refused) == (3, 0)
    assert again.spent == cost


def test_what_if_goes_by_the_records_times_not_by_their_places(ledger: Ledger) -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    for at in (2, 0, 1):
        record = GenerationRecord(id=f"at {at}", started_at=start + timedelta(hours=at), receipts=(picked(1, 5, 6),))
        ledger.record(record)
    again = ledger.what_if(Budget(escalations=1))
    assert (again.newly_refused, again.first_change) == (2, ("at 1", 1))


def test_what_if_refuses_a_question_of_unknown_price_under_a_dollar_limit(ledger: Ledger) -> None:
    unknown = Charge(None, 10)
    receipt = Receipt(step=1, prefix_tokens=9, wanted=5, pick=5, outcome="picked", reserved=unknown, actual=unknown)
    ledger.record(GenerationRecord(receipts=(receipt,)))
    assert ledger.what_if(Budget(usd=1)).newly_refused == 1
    free = ledger.what_if(Budget(escalations=1))
    assert (free.allowed, free.spent) == (1, unknown)


def test_the_selector_decides_what_would_have_stood() -> None:
    scored = (
        ReceiptCandidate(token_id=1, selector=-2.0),
        ReceiptCandidate(token_id=2, selector=-0.1),
    )
    receipt = Receipt(step=0, prefix_tokens=1, candidates=scored, wanted=1, pick=2, outcome="picked")
    assert receipt.local_pick() == 2
    half = (*scored, ReceiptCandidate(token_id=3))
    assert receipt.model_copy(update={"candidates": half}).local_pick() == 1


def test_groupings_and_file_names_that_are_not_known(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="no such grouping"):
        Ledger().totals("week")  # type: ignore[arg-type]
    with pytest.raises(LedgerError, match="not a ledger file name"):
        Ledger.open(tmp_path / "costs.xlsx")
