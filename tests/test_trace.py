"""What a ledger records of steps, and the page that ``s2t trace`` makes of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2t_agents import Budget, ChatS2T, Escalation, Ledger
from s2t_agents.chat.step_records import recorded
from s2t_agents.errors import ConfigError, LedgerError
from s2t_agents.ledger import GenerationRecord, ReceiptCandidate, Recording, StepRecord, StepTimes
from s2t_agents.ledger.record import SummedRecord
from s2t_agents.testing import ScriptedLLM, tiny_model
from s2t_agents.trace import page_of, write_trace
from s2t_agents.triggers import when
from s2t_agents.types import Step

ENDINGS = ["jsonl", "db"]


def answered(ledger: Ledger, *, count: int = 1, **settings: Any) -> list[Any]:
    """Answers of a tiny model whose every step is put to a scripted LLM; their steps."""
    steps: list[Any] = []
    llm = ScriptedLLM(lambda ids, candidates: [-float(len(candidates) - at) for at in range(len(candidates))])
    model = ChatS2T(
        model=tiny_model(),
        escalation=Escalation(llm, margin=1.0),
        trigger=when(lambda proposal: True),
        max_tokens=5,
        ledger=ledger,
        on_step=lambda trace_id, step: steps.append(step),
        **settings,
    )
    for _ in range(count):
        model.invoke("hello")
    return steps


def data_of(page: str) -> Any:
    [found] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("text", [False, True])
def test_a_record_has_the_steps_as_they_were(tmp_path: Path, ending: str, text: bool) -> None:
    path = tmp_path / f"costs.{ending}"
    steps = answered(Ledger.open(path, recording=Recording(steps=True, text=text)))
    [record] = Ledger.reading(path)
    assert record.steps is not None
    assert [each.token for each in record.steps] == [step.token_id for step in steps]
    assert [each.by for each in record.steps] == [step.picked_by for step in steps]
    assert [each.entropy for each in record.steps] == [step.entropy for step in steps]
    for each, step in zip(record.steps, steps, strict=True):
        assert each.wanted == (step.wanted_id if step.flipped else None)
        assert [(c.token_id, c.slm, c.llm) for c in each.candidates] == [
            (c.token_id, c.slm, c.llm) for c in step.candidates
        ]
        assert (each.text is not None) == text
        assert all(bool(c.text) <= text for c in each.candidates)
    assert (record.prompt is not None) == text
    if text:
        assert "hello" in str(record.prompt)


@pytest.mark.parametrize("ending", ENDINGS)
def test_nothing_is_recorded_unless_asked_for_and_the_file_is_as_before(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"costs.{ending}"
    answered(Ledger.open(path))
    [record] = Ledger.reading(path)
    assert record.steps is record.prompt is None
    assert not {"steps", "prompt"} & set(json.loads(record.model_dump_json()))


def test_text_has_steps() -> None:
    with pytest.raises(ConfigError, match="steps=True"):
        Recording(text=True)


def test_sums_step_over_steps() -> None:
    record = GenerationRecord(completion_tokens=1, steps=(StepRecord(token=3, by="slm"),), prompt="hello")
    assert SummedRecord.model_validate_json(record.model_dump_json()).steps is None
    ledger = Ledger(recording=Recording(steps=True))
    answered(ledger)
    assert ledger.total().completion_tokens == 5


scores = st.none() | st.floats(allow_nan=False)
steps_of_any_kind = st.builds(
    StepRecord,
    token=st.integers(0, 9) | st.integers(0, 10**6),
    by=st.sampled_from(["slm", "selector", "llm", "grammar"]),
    text=st.none() | st.text(),
    wanted=st.none() | st.integers(0, 9),
    shadow=st.none() | st.integers(0, 9),
    triggered=st.booleans(),
    entropy=st.none() | st.floats(0, 20),
    candidates=st.lists(
        st.builds(
            ReceiptCandidate, token_id=st.integers(0, 9), text=st.text(), slm=scores, selector=scores, llm=scores
        ),
        max_size=3,
    ).map(tuple),
    ms=st.builds(StepTimes, propose=st.none() | st.floats(0, 1e6)),
)


@given(steps=st.lists(steps_of_any_kind, max_size=4))
def test_steps_survive_json_and_the_page_tells_them(steps: list[StepRecord]) -> None:
    record = GenerationRecord(steps=tuple(steps))
    assert GenerationRecord.model_validate_json(record.model_dump_json()) == record
    page = page_of([record], agents=[], name="x", total=1)
    told = data_of(page)["records"][0]["steps"]
    for name in ("token", "text", "wanted", "shadow", "entropy"):
        assert [each.get(name) for each in told] == [getattr(step, name) for step in steps]
    assert [each.get("critical", False) for each in told] == [step.triggered for step in steps]
    assert [[c["id"] for c in each.get("candidates", [])] for each in told] == [
        [c.token_id for c in step.candidates] for step in steps
    ]


HOSTILE = [
    "</script><script>window.hit=1</script>",
    "<!--<script>",
    "<img src=x onerror=window.hit=1>",
    "]]>\u2028\u2029&lt;",
    "\ud800",
    "javascript:window.hit=1",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_leaves_its_element(text: str) -> None:
    record = GenerationRecord(
        agent=text,
        thread_id=text,
        model=text,
        error=text,
        prompt=text,
        finish_reason=text,
        steps=(StepRecord(token=1, by="slm", text=text, candidates=(ReceiptCandidate(token_id=1, text=text),)),),
    )
    page = page_of([record], agents=[], name=text.replace("\ud800", ""), total=1)
    assert len(re.findall(r"<script", page)) == 2
    assert len(re.findall(r"</script", page)) == 2
    assert "<img" not in page
    assert data_of(page)["records"][0]["agent"] == record.agent


def test_the_page_loads_nothing_and_says_so() -> None:
    page = page_of([], agents=[], name="x", total=0)
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|style=\"", page)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_long_ledger_shows_its_newest_and_sums_all(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"costs.{ending}"
    ledger = Ledger.open(path)
    for at in range(30):
        ledger.record(GenerationRecord(agent="ab"[at % 2], completion_tokens=at, thread_id=str(at)))
    page = tmp_path / "page.html"
    assert write_trace(path, page, last=7) == 7
    data = data_of(page.read_text())
    assert [each["thread"] for each in data["records"]] == [str(at) for at in range(23, 30)]
    assert {each["name"]: each["answers"] for each in data["agents"]} == {"a": 15, "b": 15}
    assert data["total"] == 30
    assert write_trace(path, page, agent="b") == 15
    assert {each["name"] for each in data_of(page.read_text())["agents"]} == {"b"}
    for name in ("b/writer", "b/writer/again", "bc", "b2/writer", "c/b"):
        ledger.record(GenerationRecord(agent=name))
    assert write_trace(path, page, agent="b") == 17
    assert write_trace(path, page, agent="b/writer") == 2
    assert {each["name"] for each in data_of(page.read_text())["agents"]} == {"b/writer", "b/writer/again"}


def test_budgets_burn_down_by_agent_and_run(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path / "costs.jsonl")
    for left in (3, 2, 0):
        state = {"limit": {"escalations": 5, "usd": "1"}, "left": {"escalations": left, "usd": f"0.{left}"}}
        ledger.record(GenerationRecord(agent="a", thread_id="t", budget=state))
    ledger.record(GenerationRecord(agent="b", budget={"left": 3}))
    write_trace(tmp_path / "costs.jsonl", tmp_path / "page.html")
    lines = {line["unit"]: line for line in data_of((tmp_path / "page.html").read_text())["burndown"]}
    assert lines["escalations"]["left"] == [3, 2, 0]
    assert lines["usd"]["left"] == ["0.3", "0.2", "0.0"]
    assert {line["agent"] for line in lines.values()} == {"a"}


def test_a_budget_is_one_line_however_many_runs_it_has_and_those_last_used_come_first(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path / "costs.jsonl")
    for left in range(80):
        for path in ("shared", f"own-{left}"):
            state = {"path": path, "limit": {"escalations": 100}, "left": {"escalations": 100 - left}}
            ledger.record(GenerationRecord(agent="a", run_id=uuid4().hex, budget=state))
    write_trace(tmp_path / "costs.jsonl", tmp_path / "page.html")
    lines = data_of((tmp_path / "page.html").read_text())["burndown"]
    assert [line["run"] for line in lines[:3]] == ["own-79", "shared", "own-78"]
    assert lines[1]["left"] == [100 - left for left in range(80)]


def test_a_budget_of_several_agents_is_one_line_in_each_unit_and_one_that_was_not_used_none(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path / "costs.jsonl")
    for left in range(8, 0, -1):
        limit = {"usd": "0.9", "answers": 9, "escalations": 9 if left > 4 else 12}  # it was extended
        fin = {"path": "fin", "limit": limit, "left": {"usd": f"0.{left}", "answers": 9, "escalations": left}}
        own = {"path": "fin/own", "limit": {"usd": "2", "escalations": 9}, "left": {"usd": "2", "escalations": left}}
        for agent, budget in ((f"agent {left % 4}", fin), ("one", own)):
            ledger.record(GenerationRecord(agent=agent, thread_id=str(left), budget=budget))
    write_trace(tmp_path / "costs.jsonl", tmp_path / "page.html")
    lines = data_of((tmp_path / "page.html").read_text())["burndown"]
    told = {(line["run"], line["unit"], line["limit"]): line["left"] for line in lines}
    assert len(lines) == len(told) == 3
    assert {line["agent"] for line in lines} == {None}
    assert told["fin/own", "escalations", 9] == told["fin", "escalations", 12] == [*range(8, 0, -1)]
    assert told["fin", "usd", "0.9"] == [f"0.{left}" for left in range(8, 0, -1)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: write_trace(folder / "none.db", folder / "page.html"), "no such ledger"),
        (lambda folder: write_trace(folder / "costs.txt", folder / "page.html"), "not a ledger"),
        (lambda folder: write_trace(folder / "costs.jsonl", folder / "page.html", agent="z"), "no answer of the agent"),
        (lambda folder: write_trace(folder / "costs.jsonl", folder / "page.html", last=0), "last is 0"),
    ],
)
def test_what_is_no_ledger_gives_no_page(tmp_path: Path, make: Callable[[Path], int], message: str) -> None:
    Ledger.open(tmp_path / "costs.jsonl").record(GenerationRecord(agent="a"))
    with pytest.raises(LedgerError, match=message):
        make(tmp_path)
    assert not (tmp_path / "page.html").exists()


FOREIGN = {
    "an entropy that is none": {"steps": [{"token": 1, "by": "slm", "entropy": float("nan")}]},
    "an entropy as text": {"steps": [{"token": 1, "by": "slm", "entropy": "Infinity"}]},
    "a budget's number": {"budget": {"limit": {"usd": float("nan")}, "left": {"usd": 1}}},
    "a budget's path": {"budget": {"limit": {"usd": 1}, "left": {"usd": 1}, "path": ["x"]}},
    "a limit": {
        "receipts": [
            {
                "step": 0,
                "prefix_tokens": 1,
                "outcome": "refused",
                "refused_by": {"budget": "b", "unit": "usd", "limit": "NaN"},
            }
        ]
    },
    "a limit of a billion digits": {"stopped_by": {"budget": "b", "unit": "usd", "limit": "1e999999999"}},
}


@pytest.mark.parametrize("fields", FOREIGN.values(), ids=FOREIGN)
def test_numbers_that_no_page_can_tell_are_refused_with_their_line(tmp_path: Path, fields: dict[str, Any]) -> None:
    path = tmp_path / "costs.jsonl"
    record = json.loads(GenerationRecord(agent="a").model_dump_json()) | fields
    path.write_text('{"s2t_ledger": 1}\n' + json.dumps(record) + "\n" + GenerationRecord().model_dump_json() + "\n")
    with pytest.raises(LedgerError, match="line 2, is not a record"):
        write_trace(path, tmp_path / "page.html")
    with pytest.raises(LedgerError, match="line 2, is not a record"):
        Ledger.reading(path).what_if(Budget(escalations=1))
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("entropy", [float("nan"), float("inf"), -float("inf")])
def test_an_entropy_that_is_no_number_is_recorded_as_unknown(entropy: float) -> None:
    step = Step(index=0, prefix_tokens=1, token_id=1, wanted_id=1, picked_by="slm", entropy=entropy)
    [kept] = recorded(Recording(steps=True), [step], str, str)["steps"]
    assert kept.entropy is None


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", ["itself", "relative", "symlink", "hard link", "symlink of its folder"])
def test_a_page_never_takes_the_place_of_its_ledger(
    tmp_path: Path, ending: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kept" / f"costs.{ending}"
    path.parent.mkdir()
    ledger = Ledger.open(path)
    ledger.record(GenerationRecord(agent="a"))
    ledger.close()
    before = path.read_bytes()
    monkeypatch.chdir(path.parent)
    (tmp_path / "symlink").symlink_to(path)
    (tmp_path / "hard link").hardlink_to(path)
    (tmp_path / "folder").symlink_to(path.parent)
    pages = {
        "itself": path,
        "relative": Path("..", "kept", path.name),
        "symlink": tmp_path / "symlink",
        "hard link": tmp_path / "hard link",
        "symlink of its folder": tmp_path / "folder" / path.name,
    }
    with pytest.raises(ConfigError, match="would replace the ledger itself"):
        write_trace(path, pages[name])
    assert path.read_bytes() == pages[name].read_bytes() == before


def test_a_page_makes_no_folder(tmp_path: Path) -> None:
    Ledger.open(tmp_path / "costs.jsonl").record(GenerationRecord())
    with pytest.raises(ConfigError, match="no such folder"):
        write_trace(tmp_path / "costs.jsonl", tmp_path / "none" / "page.html")
    assert not (tmp_path / "none").exists()
