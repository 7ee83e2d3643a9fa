"""The flywheel: every paid selection is kept as a group to train on, and nothing else is."""

import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from s2t_agents import Budget, ChatS2T
from s2t_agents.engine.engine import Engine
from s2t_agents.errors import ConfigError, EscalationFailed, InputError
from s2t_agents.escalation import Escalation, PaidGroup, paid_groups, read_groups
from s2t_agents.escalation.paid_groups import PaidGroups
from s2t_agents.ledger import GenerationRecord, Ledger
from s2t_agents.llms import Answer, LocalLLM, Question
from s2t_agents.scheduling.sequence import TokenSequence
from s2t_agents.testing import ScriptedLLM, last_candidate, tiny_model
from s2t_agents.triggers import always
from s2t_agents.types import Sampling

PROMPT = [10, 20, 30]


def record(path: Path, llm: object, *, limit: int = 99) -> list[PaidGroup]:
    escalation = Escalation(llm, margin=1.0, record=path)  # type: ignore[arg-type]
    engine = Engine(tiny_model(), k=4, trigger=always(), escalation=escalation)
    steps = list(engine.steps(PROMPT, Sampling(max_tokens=8), budget=Budget(escalations=limit)))
    paid = [step for step in steps if step.picked_by == "llm"]
    groups = list(read_groups(path)) if path.exists() else []
    assert len(groups) == len(paid)
    for group, step in zip(groups, paid, strict=True):
        assert len(group.ids) == step.prefix_tokens
        assert group.candidates == tuple(c.token_id for c in step.candidates)
        assert group.slm == tuple(c.slm for c in step.candidates)
        assert group.llm == tuple(c.llm for c in step.candidates)
    return groups


def test_a_group_holds_the_prefix_the_candidates_and_every_score(tmp_path: Path) -> None:
    groups = record(tmp_path / "groups.jsonl", LocalLLM(tiny_model(seed=5)))
    assert len(groups) == 8
    assert groups[0].ids == tuple(PROMPT)
    assert groups[0].slm_model.weights_fingerprint == tiny_model().weights_fingerprint
    assert groups[0].llm_model == "tiny-qwen3-5"
    assert groups[0].selector is None
    best = max(range(4), key=lambda at: groups[0].llm[at] or -99.0)
    assert groups[1].ids == (*PROMPT, groups[0].candidates[best])


def test_refused_and_failed_questions_leave_no_group(tmp_path: Path) -> None:
    assert len(record(tmp_path / "some.jsonl", ScriptedLLM(last_candidate), limit=3)) == 3

    def down(ids: object, candidates: object) -> list[float]:
        raise EscalationFailed("down")

    assert record(tmp_path / "none.jsonl", ScriptedLLM(down)) == []


def test_threads_append_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "groups.jsonl"
    model = ChatS2T(
        model=tiny_model(),
        max_tokens=5,
        trigger=always(),
        escalation=Escalation(ScriptedLLM(last_candidate), margin=1.0, record=path),
    )
    picked: list[int] = []

    def answer() -> None:
        picked.append(model.invoke("hello").response_metadata["s2t"]["escalations"])

    threads = [threading.Thread(target=answer) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(read_groups(path, tiny_model()))) == sum(picked) >= 8


def test_only_its_owner_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "groups.jsonl"
    record(path, ScriptedLLM(last_candidate))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_groups_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "groups.jsonl"
    record(path, ScriptedLLM(last_candidate))
    with pytest.raises(ConfigError, match="line 1, comes from 'tiny-qwen3-0' with other weights"):
        list(read_groups(path, tiny_model(seed=9)))


def test_a_torn_line_is_passed_over_and_a_foreign_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "groups.jsonl"
    groups = record(path, ScriptedLLM(last_candidate))
    with path.open("ab") as file:
        file.write(path.read_bytes().splitlines()[0][:50] + b"\n")
    assert list(read_groups(path)) == groups
    with path.open("ab") as file:
        file.write(b'{"some": "thing else"}\n')
    with pytest.raises(InputError, match="line 10, is no group"):
        list(read_groups(path))
    with pytest.raises(InputError, match="No such file"):
        list(read_groups(tmp_path / "nothing.jsonl"))


@pytest.mark.parametrize("tear", ["in the first field", "after an inner brace", "before the last byte"])
def test_what_follows_a_torn_line_is_read(tmp_path: Path, tear: str) -> None:
    path = tmp_path / "groups.jsonl"
    groups = record(path, ScriptedLLM(last_candidate))
    line = path.read_bytes().splitlines()[0]
    at = {"in the first field": 5, "after an inner brace": line.index(b"}") + 1, "before the last byte": len(line) - 1}
    with path.open("ab") as file:
        file.write(line[: at[tear]])
    assert list(read_groups(path)) == groups
    PaidGroups(path, "llm").add(asked(), Answer((-1.0, None)))
    assert [group.ids for group in read_groups(path)] == [*(group.ids for group in groups), tuple(PROMPT)]


def asked() -> Question:
    prefix = TokenSequence(tiny_model())
    prefix.append(PROMPT)
    return Question(PROMPT, [1, 2], prefix=prefix, slm=(-1.0, -2.0))


def test_a_disk_that_does_not_take_it_costs_a_warning_and_not_the_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    escalation = Escalation(ScriptedLLM(last_candidate), margin=1.0, record=tmp_path / "taken")
    (tmp_path / "taken").mkdir()
    steps = list(Engine(tiny_model(), trigger=always(), escalation=escalation).steps(PROMPT, Sampling(max_tokens=3)))
    assert [step.picked_by for step in steps] == ["llm"] * 3
    assert "was not recorded" in caplog.text


def test_a_file_that_another_process_keeps_locked_costs_a_warning_and_not_the_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(paid_groups, "WAIT_S", 0.05)
    path = tmp_path / "groups.jsonl"
    with path.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        escalation = Escalation(ScriptedLLM(last_candidate), margin=1.0, record=path)
        engine = Engine(tiny_model(), trigger=always(), escalation=escalation)
        steps = list(engine.steps(PROMPT, Sampling(max_tokens=3)))
        assert [step.picked_by for step in steps] == ["llm"] * 3
        assert caplog.text.count("another process kept it locked") == 3
        assert list(read_groups(path)) == []
    assert len(record(path, ScriptedLLM(last_candidate))) == 8


def ledger_lines(path: Path) -> None:
    Ledger.open(path.with_suffix(".jsonl")).record(GenerationRecord())
    path.with_suffix(".jsonl").rename(path)


def ledger_in_sqlite(path: Path) -> None:
    Ledger.open(path.with_suffix(".db")).close()
    path.with_suffix(".db").rename(path)


FOREIGN = {
    "a ledger": ledger_lines,
    "a ledger of SQLite": ledger_in_sqlite,
    "a ledger without records": lambda path: path.write_bytes(b'{"s2t_ledger": 1}\n'),
    "text": lambda path: path.write_bytes(b"my notes, no newline at the end"),
    "other JSON lines": lambda path: path.write_bytes(b'{"format":1,"messages":[]}\n'),
    "JSON of another format": lambda path: path.write_bytes(b'{"format":2,"slm_model":{}}\n'),
    "text after blank lines": lambda path: path.write_bytes(b"\n \n[]"),
    "bytes": lambda path: path.write_bytes(bytes(range(256)) * 99),
    "a folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_a_file_that_holds_something_else_is_refused_at_construction_and_left_alone(
    tmp_path: Path, make: Callable[[Path], object]
) -> None:
    path = tmp_path / "groups"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(ConfigError, match=r"groups'.*not changed"):
        Escalation(ScriptedLLM(last_candidate), record=path)
    assert before == (path.read_bytes() if path.is_file() else None)


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_a_file_that_became_something_else_is_left_alone_and_costs_a_warning(
    tmp_path: Path, make: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "groups"
    escalation = Escalation(ScriptedLLM(last_candidate), margin=1.0, record=path)
    make(path)
    before = path.read_bytes() if path.is_file() else None
    steps = list(Engine(tiny_model(), trigger=always(), escalation=escalation).steps(PROMPT, Sampling(max_tokens=2)))
    assert [step.picked_by for step in steps] == ["llm"] * 2
    assert "was not recorded" in caplog.text
    assert before == (path.read_bytes() if path.is_file() else None)


@pytest.mark.parametrize("left", [b"", b"\n", b"{", b'{"form', b'{"format":1,"slm_model":{"na'])
def test_a_file_of_its_own_goes_on_wherever_its_first_line_was_torn(tmp_path: Path, left: bytes) -> None:
    path = tmp_path / "groups.jsonl"
    path.write_bytes(left)
    first = record(path, ScriptedLLM(last_candidate))
    escalation = Escalation(ScriptedLLM(last_candidate), margin=1.0, record=path)
    list(Engine(tiny_model(), k=4, trigger=always(), escalation=escalation).steps(PROMPT, Sampling(max_tokens=8)))
    assert list(read_groups(path)) == first * 2


def test_a_folder_that_is_not_there_is_refused_at_construction(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        Escalation(ScriptedLLM(last_candidate), record=tmp_path / "no" / "groups.jsonl")
