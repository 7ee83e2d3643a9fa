"""LangChain's interface beyond answering: copies, pickles, caches, profiles, token counts."""

import copy
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.messages import (
    AIMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    trim_messages,
)
from langchain_core.rate_limiters import InMemoryRateLimiter
from langchain_core.runnables import ConfigurableField
from langchain_core.tools import tool
from observers import cache_key

from s2t_agents import Budget, ChatS2T, Ledger, LocalLLM
from s2t_agents.budget import SQLiteStore
from s2t_agents.escalation import Escalation
from s2t_agents.formats.reasoning import ReasoningFormat
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.testing import ScriptedLLM, last_candidate, tiny_model
from s2t_agents.triggers import always


def chat(**settings: Any) -> ChatS2T:
    return ChatS2T(**{"model": tiny_model(max_position_embeddings=4096), "max_tokens": 12, **settings})


@pytest.fixture
def saved(tmp_path: Path) -> str:
    """A checkpoint in a directory."""
    slm = tiny_model()
    slm.model.save_pretrained(tmp_path)
    slm.tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool
def now() -> str:
    """Tell the time."""
    return "noon"


# ---------------------------------------------------------------------- overrides and copies


def test_a_call_may_name_another_model_which_runs_without_the_selector(saved: str) -> None:
    model = chat(ledger=Ledger(), escalation=LocalLLM(saved), trigger=always(), k=2)
    other = model.invoke("hello", model=saved)
    assert other.response_metadata["model_name"] == saved
    assert other.response_metadata["s2t"]["triggers"] == 0  # no selector, and no escalation to itself
    assert model.invoke("hello").response_metadata["s2t"]["triggers"] > 0
    assert [record.model for record in model.ledger.records()] == [saved, "tiny-qwen3-0"]


def test_an_overriding_model_is_loaded_once(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    real = LanguageModel.load.__func__
    monkeypatch.setattr(
        LanguageModel,
        "load",
        classmethod(lambda cls, path, **options: loads.append(path) or real(cls, path, **options)),
    )
    model = chat()
    for _ in range(3):
        model.invoke("hello", model=saved)
        model.bind(model=saved).invoke("hello")
    assert loads == [saved]


def test_configurable_fields_and_copies_change_settings_and_share_weights(saved: str) -> None:
    model = ChatS2T(model=saved, max_tokens=9)
    held = model.engine.slm
    fields = model.configurable_fields(max_tokens=ConfigurableField(id="room"), k=ConfigurableField(id="k"))
    answer = fields.with_config(configurable={"room": 3, "k": 4}).invoke("hello")
    assert answer.usage_metadata["output_tokens"] == 3
    copied = model.model_copy(update={"k": 5})
    assert copied.engine.k == 5
    assert copied.engine.slm is held


def test_deep_copies_share_weights_budget_and_ledger() -> None:
    model = chat(budget=Budget(escalations=3), ledger=Ledger())
    copied = copy.deepcopy(model)
    assert copied.engine is model.engine
    assert copied.budget is model.budget
    assert copied.ledger is model.ledger
    copied.temperature = 1.0
    assert model.temperature == 0.0


def test_pickles_carry_settings_and_no_weights(saved: str, tmp_path: Path) -> None:
    budget = Budget(escalations=7, store=SQLiteStore(tmp_path / "b.db"))
    model = ChatS2T(model=saved, escalation=LocalLLM(saved), budget=budget, k=3, max_tokens=5, stop=["x"])
    said = model.invoke("hello").content
    data = pickle.dumps(model)
    assert len(data) < 10_000
    again = pickle.loads(data)
    assert (again.k, again.max_tokens, again.stop, again.model) == (3, 5, ["x"], saved)
    assert again.invoke("hello").content == said
    assert cache_key(again) == cache_key(model)
    assert len(pickle.dumps(chat())) < 10_000


@pytest.mark.parametrize("name", ["costs.jsonl", "costs.db"])
def test_a_pickle_writes_into_the_same_ledger_file(name: str, saved: str, tmp_path: Path) -> None:
    model = ChatS2T(model=saved, max_tokens=3, ledger=Ledger.open(tmp_path / name))
    pickle.loads(pickle.dumps(model)).invoke("hello")
    assert model.ledger.total().generations == 1


def test_a_budget_in_memory_is_not_doubled_by_a_pickle() -> None:
    with pytest.raises(TypeError, match="SQLiteStore or RedisStore"):
        pickle.dumps(chat(budget=Budget(escalations=1)))


# ---------------------------------------------------------------------- cache, limits, retries


def test_a_cache_hit_is_the_same_answer_free_in_metadata_and_ledger() -> None:
    llm = ScriptedLLM(last_candidate)
    settings = {"trigger": always(), "escalation": Escalation(llm, margin=1.0), "budget": Budget(escalations=99)}
    model = chat(cache=InMemoryCache(), ledger=Ledger(), **settings)
    first = model.invoke("hello", s2t_agent="one")
    again = model.invoke("hello", s2t_agent="one", s2t_budget=Budget(escalations=5))
    assert again.content == first.content
    assert again.usage_metadata["output_tokens"] == first.usage_metadata["output_tokens"]
    s2t = again.response_metadata["s2t"]
    assert (s2t["escalations"], s2t["cost_usd"]) == (0, {"local": 0.0, "llm": 0.0, "total": 0.0})
    assert s2t["trace_id"] == first.response_metadata["s2t"]["trace_id"]
    assert first.response_metadata["s2t"]["escalations"] == 12
    assert model.budget.state().spent["escalations"] == 12
    paid, free = model.ledger.records()
    assert (paid.cached, free.cached, free.escalations, free.cost_usd.total) == (False, True, 0, 0)
    assert model.ledger.total().cached == 1


def figures(told: dict[str, Any], path: str = "") -> dict[str, float]:
    """Every number in a message's metadata, those of dicts within, too; truths are none."""
    found: dict[str, float] = {}
    for name, value in told.items():
        if isinstance(value, dict):
            found |= figures(value, f"{path}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[path + name] = value
    return found


@pytest.mark.parametrize("shadow", [False, True], ids=["asking", "shadow"])
def test_every_figure_of_a_cache_hit_but_its_tokens_is_zero(shadow: bool) -> None:
    llm = Escalation(ScriptedLLM(last_candidate), margin=1.0)
    model = chat(cache=InMemoryCache(), trigger=always(), escalation=llm, shadow=shadow)
    model.invoke("hello " * 40, max_tokens=1)  # leaves its KV behind
    paid, free = (model.invoke("hello " * 40).response_metadata["s2t"] for _ in range(2))
    assert {"tokens", "reused_tokens", "triggers", "escalations"} <= {name for name, n in figures(paid).items() if n}
    assert {name for name, n in figures(free).items() if n} == {"tokens"}
    assert figures(free)["reused_tokens"] == 0


def test_a_cache_hit_tells_nothing_of_the_budget_of_whoever_asked_first() -> None:
    model = chat(cache=InMemoryCache(), trigger=always(), escalation=Escalation(ScriptedLLM(last_candidate), margin=1))
    first = model.invoke("hello", s2t_budget=Budget(name="tenant-a", escalations=1))
    again = model.invoke("hello", s2t_budget=Budget(name="tenant-b", escalations=50))
    assert first.response_metadata["s2t"]["budget"]["limit"] == {"escalations": 1}
    assert again.response_metadata["s2t"]["budget"] is None
    assert again.response_metadata["s2t"]["degraded"]  # of the text itself, whoever reads it


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
async def test_an_answer_that_a_budget_cut_off_is_no_answer_to_the_next_caller(is_async: bool) -> None:
    model = chat(cache=InMemoryCache())

    async def answer(**call: Any) -> AIMessage:
        return await model.ainvoke("hello", **call) if is_async else model.invoke("hello", **call)

    cut = await answer(s2t_budget=Budget(answer_tokens=2, on_exhausted="degrade"))
    assert cut.response_metadata["s2t"]["stopped_by"]
    whole = await answer(s2t_budget=Budget(answer_tokens=500))
    assert whole.content == chat().invoke("hello").content != cut.content
    assert not whole.response_metadata["s2t"].get("stopped_by")


def test_who_asks_on_which_budget_is_no_part_of_the_caches_key() -> None:
    assert cache_key(chat(budget=Budget(escalations=1))) == cache_key(chat())
    assert cache_key(chat(), s2t_agent="a", s2t_budget=Budget(escalations=1)) == cache_key(chat())
    assert cache_key(chat(), tools=[{}]) != cache_key(chat())


def test_a_rate_limiter_is_waited_for() -> None:
    waited: list[bool] = []

    class Counting(InMemoryRateLimiter):
        def acquire(self, *, blocking: bool = True) -> bool:
            waited.append(blocking)
            return True

    model = chat(rate_limiter=Counting(), max_tokens=1)
    for _ in range(3):
        model.invoke("hello")
    assert waited == [True, True, True]


def test_retries_and_fallbacks_are_langchains_own() -> None:
    good, bad = chat(), chat(model="/no/such/model")
    assert bad.with_fallbacks([good]).invoke("hello").content == good.invoke("hello").content
    assert good.with_retry(stop_after_attempt=2).invoke("hello").content == good.invoke("hello").content


def test_disable_streaming_and_v1_output() -> None:
    whole = chat(disable_streaming=True)
    assert len(list(whole.stream("hello"))) == 1
    blocks = chat(output_version="v1").invoke("hello").content
    assert [block["type"] for block in blocks] == ["text"]
    call = chat(output_version="v1", max_tokens=64).bind_tools([now], tool_choice="any").invoke("hello")
    assert [block["type"] for block in call.content_blocks] == ["tool_call"]


def test_a_stop_string_alone_is_one_stop_string() -> None:
    whole = str(chat().invoke("hello").content)
    stop = whole[2:4]
    assert (
        chat(stop=stop).invoke("hello").content == chat().invoke("hello", stop=[stop]).content == whole.split(stop)[0]
    )


# ---------------------------------------------------------------------- counting and profile


def test_tokens_are_counted_by_the_models_own_template_without_weights(
    saved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = chat().invoke([SystemMessage("a"), HumanMessage("bc")])
    model = ChatS2T(model=saved)
    monkeypatch.setattr(LanguageModel, "load", lambda *a, **k: pytest.fail("weights were read"))
    assert model.get_num_tokens("abc") == 3
    counted = model.get_num_tokens_from_messages([SystemMessage("a"), HumanMessage("bc")])
    opening = len("assistant") + 1
    assert counted == said.usage_metadata["input_tokens"] - opening
    assert model.get_num_tokens_from_messages([]) == 0
    assert model.get_num_tokens("<|im_end|>") == 10


def test_a_counter_of_the_users_own_counts_texts_and_enters_no_prompt() -> None:
    plain, own = chat(), chat(custom_get_token_ids=lambda text: [len(text)] * 2)
    assert own.get_token_ids("hello") == [5, 5]
    assert own.get_num_tokens("hello there") == 2
    messages = [HumanMessage("hello")]
    assert own.get_num_tokens_from_messages(messages) == plain.get_num_tokens_from_messages(messages)
    assert own.invoke(messages).usage_metadata == plain.invoke(messages).usage_metadata
    with pytest.raises(ZeroDivisionError):
        chat(custom_get_token_ids=lambda text: [1 // 0]).get_num_tokens("hello")


def test_parts_of_a_conversation_can_be_counted_and_trimmed() -> None:
    history = [
        HumanMessage("first " * 20),
        AIMessage("", tool_calls=[{"name": "now", "args": {}, "id": "1"}]),
        ToolMessage("noon", tool_call_id="1"),
        HumanMessage("second"),
    ]
    model = chat()
    assert model.get_num_tokens_from_messages(history[2:]) > 0
    kept = trim_messages(history, max_tokens=60, token_counter=model, start_on="human", include_system=True)
    assert kept == history[3:]


def test_the_profile_says_what_the_model_can_do() -> None:
    profile = chat().profile
    assert profile["max_input_tokens"] == 4096
    assert profile["max_output_tokens"] == 12
    assert profile["tool_calling"]
    assert profile["structured_output"]
    assert not profile["image_inputs"]
    for unknown in ("nobody/has-this", "no hub id"):
        assert "max_input_tokens" not in ChatS2T(model=unknown).profile


@pytest.mark.real
def test_the_profile_tells_models_that_think(real_tokenizer: Any) -> None:
    folder, template = real_tokenizer.name_or_path, str(real_tokenizer.chat_template or "")
    thinks = ReasoningFormat.of(real_tokenizer, template) is not None
    assert ChatS2T(model=folder).profile["reasoning_output"] is thinks
    assert thinks is ("qwen3" in folder)


def test_the_profile_knows_reasoning_from_the_template_and_leaves_the_unknown_out() -> None:
    assert chat().profile["reasoning_output"] is False
    thinking = ChatS2T(model="s2t-demo", chat_template="{{ messages }}<think>{{ '</think>' }}")
    assert thinking.profile["reasoning_output"] is True
    assert "reasoning_output" not in ChatS2T(model="nobody/has-this").profile


def test_the_profile_of_a_checkpoint_on_disk_reads_its_config_alone(saved: str) -> None:
    (Path(saved) / "model.safetensors").unlink()
    assert ChatS2T(model=saved).profile["max_input_tokens"] == 512


def test_the_profile_of_a_hub_model_comes_from_the_local_cache(saved: str, tmp_path: Path) -> None:
    repo, commit = tmp_path / "models--somebody--some-model", "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    shutil.copy(Path(saved) / "config.json", repo / "snapshots" / commit)
    model = ChatS2T(model="somebody/some-model", model_kwargs={"cache_dir": str(tmp_path)})
    assert model.profile["max_input_tokens"] == 512
