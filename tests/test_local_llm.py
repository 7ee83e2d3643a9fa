"""LocalLLM: loaded at the first question, its KV extended lazily, exact after every fork of a conversation."""

import pickle
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2t_agents import Budget, ChatS2T, Ledger
from s2t_agents.engine.engine import Engine
from s2t_agents.errors import EscalationFailed, Overloaded
from s2t_agents.escalation import Escalation
from s2t_agents.llms import LocalLLM, Question, local_llm
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.scheduling.sequence import TokenSequence
from s2t_agents.scheduling.waits import finish
from s2t_agents.testing import ARCHITECTURES, RECURRENT, tiny_model
from s2t_agents.triggers import always
from s2t_agents.types import Sampling

CANDIDATES = [3, 200, 17]


def full(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    return model.model(torch.tensor([ids])).logits[0, -1].log_softmax(0)[CANDIDATES]


@pytest.mark.parametrize("name", [*ARCHITECTURES, *RECURRENT])
def test_lazily_synced_scores_equal_a_full_forward(name: str) -> None:
    model = tiny_model(name, seed=5)
    session = LocalLLM(model).open()
    for ids in (list(range(30)), [*range(30), 7, 8], [*range(25), 99], [4]):
        assert torch.allclose(torch.tensor(session.scores(ids, CANDIDATES)), full(model, ids), atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 250), min_size=1, max_size=25), min_size=1, max_size=6), st.data())
def test_sessions_that_share_caches_stay_exact(walk: list[list[int]], data: st.DataObject) -> None:
    model = tiny_model(seed=5)
    llm = LocalLLM(model)
    session = llm.open()
    for ids in walk:
        if data.draw(st.booleans()):
            session.close()
            session = llm.open()
        assert torch.allclose(torch.tensor(session.scores(ids, CANDIDATES)), full(model, ids), atol=1e-4)


def test_only_what_is_new_is_read_and_announced_before() -> None:
    llm = LocalLLM(tiny_model())
    session = llm.open()
    assert session.uncached_tokens([1, 2, 3]) == 3
    session.scores([1, 2, 3], CANDIDATES)
    assert session.uncached_tokens([1, 2, 3, 4, 5]) == 2
    assert session.uncached_tokens([1, 9]) == 1
    session.close()
    assert llm.open().uncached_tokens([1, 2, 3, 4]) == 1  # the next turn continues


@pytest.mark.parametrize("name", [*ARCHITECTURES, *RECURRENT])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), Overloaded("no room"), RuntimeError("broken"), None], ids=repr)
@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("read", [[7, 8], [7], []], ids=["cut by two", "cut by one", "extended"])
def test_a_question_that_ends_within_a_forward_leaves_the_next_one_right(
    name: str, error: BaseException | None, chunk: int, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, front = tiny_model(name), list(range(30))
    model.backend.limits = replace(model.backend.limits, prefill_alone=16)
    session = LocalLLM(model).open()
    session.scores([*front, *read], CANDIDATES)
    waiting = session.scoring([*front, *range(99, 140)], CANDIDATES)
    forward, chunks = type(model.backend).forward, []

    def failing(self: Any, batch: Any) -> Any:
        chunks.append(batch)
        if error is not None and len(chunks) == chunk:
            raise error
        return forward(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(type(model.backend), "forward", failing)
        if error is None:  # closed while it waits, as ``gather`` does where another fails
            next(waiting)
            waiting.close()
        else:
            with suppress(EscalationFailed, type(error)):
                finish(waiting)
            assert len(chunks) == chunk or name in RECURRENT  # some of which read it in one
    for ids in (front, [*front, *read], [*front, 99], list(range(20))):
        assert session.scores(ids, CANDIDATES) == pytest.approx(full(model, ids).tolist(), abs=1e-4)


def test_the_next_turn_of_another_scope_continues_nothing() -> None:
    slm, llm = tiny_model(), LocalLLM(tiny_model())

    def asked(scope: str | None) -> Question:
        prefix = TokenSequence(slm, scope)
        prefix.append([1, 2, 3, 4])
        return Question(prefix.ids, CANDIDATES, prefix=prefix)

    session = llm.open()
    session.ask(asked("a"))
    session.close()
    for scope in ("b", None):
        assert llm.open().quote(asked(scope)).llm_tokens == 4 + 1
    assert llm.open().quote(asked("a")).llm_tokens == 0 + 1


def test_two_sessions_at_once_never_share_a_cache() -> None:
    llm = LocalLLM(tiny_model())
    first = llm.open()
    first.scores([1, 2, 3], CANDIDATES)
    assert llm.open().uncached_tokens([1, 2, 3]) == 3


@pytest.fixture
def saved(tmp_path: Path) -> str:
    model = tiny_model()
    model.model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def test_weights_are_read_at_the_first_question_only(saved: str) -> None:
    llm = LocalLLM(saved)
    llm.check(tiny_model())
    session = llm.open()
    session.uncached_tokens([1, 2])
    assert not llm.loaded
    session.scores([1, 2], CANDIDATES)
    assert llm.loaded


def test_it_pickles_as_its_settings(saved: str) -> None:
    llm = LocalLLM(saved)
    llm.open().scores([1], CANDIDATES)
    again = pickle.loads(pickle.dumps(llm))
    assert not again.loaded
    assert again.open().scores([1], CANDIDATES) == llm.open().scores([1], CANDIDATES)


def test_another_vocabulary_is_told_from_extra_tokens() -> None:
    import copy

    slm, llm = tiny_model(), tiny_model(seed=5)
    wider = copy.deepcopy(llm.tokenizer)
    wider.add_special_tokens({"additional_special_tokens": ["<|extra|>"]})
    assert LocalLLM(LanguageModel(llm.model, wider, name="wider")).shares_tokens(slm)
    assert LocalLLM(llm).shares_tokens(LanguageModel(slm.model, wider, name="slm whose extra token has no embedding"))
    narrow = LanguageModel(tiny_model(vocab_size=264).model, wider, name="slm with more")
    assert not LocalLLM(llm).shares_tokens(narrow)
    LocalLLM(llm).check(narrow)  # by bytes


def test_a_prefix_beyond_the_llms_context_is_a_failed_escalation() -> None:
    with pytest.raises(EscalationFailed, match="does not fit"):
        LocalLLM(tiny_model(max_position_embeddings=8)).open().scores(list(range(8)), CANDIDATES)


def test_a_local_llm_that_runs_out_of_memory_costs_nothing_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    large, left = tiny_model(seed=5), [2]
    real = large.backend.forward

    def starved(batch: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise RuntimeError("out of memory: tried to allocate 20 GiB")
        return real(batch)

    monkeypatch.setattr(large.backend, "forward", starved)
    budget, ledger = Budget(escalations=50), Ledger()
    model = ChatS2T(
        model=tiny_model(),
        max_tokens=4,
        trigger=always(),
        escalation=Escalation(LocalLLM(large), margin=1.0),
        budget=budget,
        ledger=ledger,
    )
    s2t = model.invoke("hello").response_metadata["s2t"]
    [record] = ledger.records()
    assert [receipt.outcome for receipt in record.receipts][:3] == ["failed", "failed", "picked"]
    assert "out of memory" in record.receipts[0].reason
    assert s2t["degraded"]
    assert (budget.state().spent["escalations"], budget.state().holds) == (s2t["escalations"], 0)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was loaded, or was to be."""
    names: list[str] = []
    real = LanguageModel.load
    monkeypatch.setattr(
        local_llm.LanguageModel, "load", lambda name, **options: (names.append(name), real(name, **options))[1]
    )
    return names


def cut_weights(saved: str) -> bytes:
    file = Path(saved) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000])
    return whole


def test_weights_that_cannot_be_read_are_tried_once_and_every_question_says_why(saved: str, loads: list[str]) -> None:
    cut_weights(saved)
    engine = Engine(tiny_model(), trigger=always(), escalation=Escalation(LocalLLM(saved), margin=1.0))
    steps = list(engine.steps([1, 2, 3], Sampling(max_tokens=4)))
    assert loads == [saved]
    assert [step.escalation.outcome for step in steps if step.escalation] == ["failed"] * 4
    [reason] = {step.escalation.reason for step in steps if step.escalation}
    assert f"the weights of '{saved}' cannot be loaded" in reason


def test_weights_that_could_not_be_read_are_tried_again_later(
    saved: str, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, llm = cut_weights(saved), LocalLLM(saved)
    monkeypatch.setattr(local_llm, "RELOAD_S", 0.0)
    with pytest.raises(EscalationFailed, match="cannot be loaded"):
        llm.load()
    (Path(saved) / "model.safetensors").write_bytes(whole)
    assert llm.open().scores([1, 2], CANDIDATES)
    assert loads == [saved, saved]


def test_an_option_that_no_loader_knows_does_not_take_the_answer_down(saved: str) -> None:
    with pytest.raises(EscalationFailed, match="cannot be loaded"):
        LocalLLM(saved, no_such_option=True).open().ask(Question([1, 2], CANDIDATES))
