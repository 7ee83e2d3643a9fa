"""The key of LangChain's cache: whatever changes an answer is in it, by content or by a token, never by an address."""

import copy
import gc
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.caches import InMemoryCache
from langchain_core.language_models import BaseChatModel, FakeListChatModel
from observers import cache_key
from pydantic import create_model
from torch import Tensor

from s2t_agents import Budget, ChatS2T, Ledger, LocalLLM, OpenAILLM
from s2t_agents.backends.torch.lora import Lora
from s2t_agents.budget import DevicePrice
from s2t_agents.chat.runtime import RuntimeCache
from s2t_agents.escalation import Escalation, Pacing
from s2t_agents.llms import ChatJudge
from s2t_agents.proposal import Proposal
from s2t_agents.scheduling.admission import Concurrency
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.selectors import ActivatedSelector, HeadSelector, PublishedSelector
from s2t_agents.testing import ScriptedLLM, last_candidate, tiny_model, tiny_tokenizer
from s2t_agents.triggers import Trigger, always, at_random, entropy, margin, never, probe, when

SLM = tiny_model()


def key(**settings: Any) -> str:
    return cache_key(ChatS2T(**{"model": SLM, **settings}))


def head(seed: int, **settings: Any) -> HeadSelector:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return HeadSelector(SLM, width=8, **settings)


def adapted(kind: type, seed: int, alpha: float = 16.0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(SLM, Lora.fresh(SLM.model, targets=["q_proj"], rank=2, alpha=alpha))


def named(name: str, seed: int, architecture: str = "qwen3") -> LanguageModel:
    return LanguageModel(tiny_model(architecture, seed=seed).model, tiny_tokenizer(), name=name)


def judge(temperature: float = 0.0, **settings: Any) -> ChatJudge:
    return ChatJudge(ChatS2T(model=SLM, temperature=temperature), **settings)


class First:
    """A selector without a repr."""

    def scores(self, proposal: Proposal) -> Tensor:
        return -torch.arange(len(proposal.candidates)).float()


@dataclass
class Biased(First):
    """A selector whose repr tells its setting; it is not hashable."""

    by: float


@dataclass
class Wrapping(First):
    """A selector whose repr holds what it wraps."""

    function: Callable[..., Any]


class Every(Trigger):
    """A trigger without a repr."""

    def __init__(self, period: int) -> None:
        self.period = period

    def __call__(self, proposal: Proposal) -> bool:
        return len(proposal.prefix) % self.period == 0


WEIGHT = torch.linspace(-1, 1, SLM.hidden_size + 1)

URL = "http://127.0.0.1:1/v1"

DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    name: ({setting: one}, {setting: other})
    for name, setting, one, other in [
        ("when", "trigger", when(lambda _: True), when(lambda _: False)),
        ("when inside |", "trigger", never() | when(lambda _: True), never() | when(lambda _: False)),
        ("trigger without repr", "trigger", Every(2), Every(3)),
        ("trigger without repr in &", "trigger", always() & Every(2), always() & Every(3)),
        ("entropy", "trigger", entropy(above=0.5), entropy(above=0.50000001)),
        ("margin", "trigger", margin(below=0.5), margin(below=0.50000001)),
        ("rate", "trigger", at_random(0.1), at_random(0.10000001)),
        ("seed", "trigger", at_random(0.1, seed=1), at_random(0.1, seed=2)),
        ("probe's threshold", "trigger", probe(WEIGHT, 0.0, above=0.5), probe(WEIGHT, 0.0, above=0.50000001)),
        ("probe's bias", "trigger", probe(WEIGHT, 0.0, above=0.5), probe(WEIGHT, 1e-9, above=0.5)),
        ("probe's weight", "trigger", probe(WEIGHT, 0.0, above=0.5), probe(WEIGHT.flip(0), 0.0, above=0.5)),
        ("head", "selector", head(0), head(1)),
        ("head's temperature", "selector", head(0), head(0, temperature=1.0000001)),
        ("head's caution", "selector", head(0), head(0, caution=0.1)),
        ("kind", "selector", adapted(ActivatedSelector, 0), adapted(PublishedSelector, 0)),
        ("adapter", "selector", adapted(ActivatedSelector, 0), adapted(ActivatedSelector, 1)),
        ("adapter's scale", "selector", adapted(ActivatedSelector, 0), adapted(ActivatedSelector, 0, alpha=8.0)),
        ("selector without repr", "selector", First(), First()),
        ("selector with a repr", "selector", Biased(1.0), Biased(1.0000000001)),
        ("selector around a function", "selector", Wrapping(lambda: 1), Wrapping(lambda: 1)),
        ("LLM without repr", "escalation", ScriptedLLM(last_candidate), ScriptedLLM(last_candidate)),
        ("local LLM", "escalation", LocalLLM(named("llm", 1)), LocalLLM(named("llm", 2))),
        ("local LLM's options", "escalation", LocalLLM("llm"), LocalLLM("llm", dtype=torch.bfloat16)),
        ("local LLM's template", "escalation", LocalLLM("llm"), LocalLLM("llm", chat_template="{{ messages }}")),
        ("server's tokenizer", "escalation", OpenAILLM(URL, "m"), OpenAILLM(URL, "m", tokenizer="some/tokenizer")),
        (
            "server's template",
            "escalation",
            OpenAILLM(URL, "m", tokenizer="some/tokenizer"),
            OpenAILLM(URL, "m", tokenizer="some/tokenizer", chat_template="{{ messages }}"),
        ),
        ("judge's seed", "escalation", judge(), judge(seed=1)),
        ("judge's preview", "escalation", judge(), judge(preview_tokens=3)),
        ("judge's context", "escalation", judge(), judge(context_chars=3)),
        ("judge's own settings", "escalation", judge(), judge(temperature=0.5)),
        ("margin of an escalation", "escalation", Escalation(LocalLLM("a")), Escalation(LocalLLM("a"), margin=0.9)),
        (
            "pacing",
            "escalation",
            Escalation(LocalLLM("a"), pacing=Pacing(9)),
            Escalation(LocalLLM("a"), pacing=Pacing(9, margins=(0.5,))),
        ),
        ("weights of a loaded model", "model", named("slm", 1), named("slm", 2)),
        ("dtype of a loaded model", "model", named("slm", 1), LanguageModel(
            tiny_model(seed=1).model.bfloat16(), tiny_tokenizer(), name="slm")),
        ("options", "model_kwargs", {"quantization_config": First()}, {"quantization_config": First()}),
        ("variables", "template_args", {"now": lambda: 1}, {"now": lambda: 2}),
    ]
}  # fmt: skip


CHANGING_ANSWERS: dict[str, Any] = {
    "model": "some/model",
    "selector": "some/selector",
    "escalation": LocalLLM("llm"),
    "k": 2,
    "trigger": always(),
    "temperature": 0.5,
    "top_p": 0.5,
    "max_tokens": 5,
    "max_thinking_tokens": 5,
    "stop": ["q"],
    "seed": 1,
    "dtype": "bfloat16",
    "model_kwargs": {"attn_implementation": "eager"},
    "template_args": {"enable_thinking": False},
    "chat_template": "{{ messages }}",
    "shadow": True,
}
CHANGING_NONE: dict[str, Any] = {
    "budget": Budget(escalations=1),
    "ledger": Ledger(),
    "device": "cpu",
    "device_price": DevicePrice(1),
    "concurrency": Concurrency(running=1),
    "cache_scope": "tenant",
    "on_step": lambda trace_id, step: None,
    "streaming": True,
    "api_key": "sk-none",
    "max_retries": 3,
    "timeout": 60.0,
    "runtimes": RuntimeCache(),
}
"""Who pays, who is told, where and when it runs: another value than the default's."""


@pytest.mark.parametrize("setting", [name for name in ChatS2T.model_fields if name not in BaseChatModel.model_fields])
def test_a_setting_is_in_the_key_or_is_known_to_change_no_answer(setting: str) -> None:
    known = CHANGING_ANSWERS | CHANGING_NONE
    assert setting in known, f"does {setting} change an answer? Give it a value in one of the two dicts above"
    assert (key(**{setting: known[setting]}) != key()) == (setting in CHANGING_ANSWERS)


@pytest.mark.parametrize("name", DIFFERENT)
def test_settings_that_may_answer_otherwise_have_another_key(name: str) -> None:
    one, other = DIFFERENT[name]
    assert key(**one) != key(**other)


@pytest.mark.parametrize("name", DIFFERENT)
def test_the_same_settings_have_the_same_key_in_copies_too_and_without_an_address(name: str) -> None:
    for settings in DIFFERENT[name]:
        model = ChatS2T(**{"model": SLM, **settings})
        found = cache_key(model)
        assert found == cache_key(model) == cache_key(copy.deepcopy(model)) == key(**settings)
        assert not re.search(r"0x[0-9a-f]{6,}", found)


@pytest.mark.parametrize(
    "settings",
    [
        lambda: {"trigger": entropy(above=0.5) | margin(below=0.1)},
        lambda: {"trigger": at_random(0.1, seed=3)},
        lambda: {"trigger": probe(WEIGHT.clone(), 0.25, above=0.5)},
        lambda: {"trigger": when(lambda _: True, "mine")},
        lambda: {"selector": head(3)},
        lambda: {"selector": adapted(ActivatedSelector, 3)},
        lambda: {"selector": Biased(0.5)},
        lambda: {"escalation": LocalLLM("somebody/llm", dtype=torch.bfloat16)},
        lambda: {"escalation": LocalLLM(named("llm", 1))},
        lambda: {"escalation": judge()},
        lambda: {"model": named("slm", 1)},
        lambda: {"model_kwargs": {"attn_implementation": "eager"}},
    ],
    ids=[
        "composed",
        "random",
        "probe",
        "named",
        "head",
        "adapter",
        "repr",
        "path",
        "loaded",
        "judge",
        "slm",
        "options",
    ],
)
def test_settings_of_equal_content_share_the_key(settings: Callable[[], dict[str, Any]]) -> None:
    assert key(**settings()) == key(**settings())


def test_objects_that_take_the_place_of_others_in_memory_have_keys_of_their_own() -> None:
    keys = set()
    for _ in range(50):
        keys.add(key(selector=First()))
        gc.collect(0)
    assert len(keys) == 50


def test_weights_that_are_trained_on_change_the_key() -> None:
    selector = head(0)
    before = key(selector=selector)
    with torch.no_grad():
        selector.out.weight.data[0, 0] += 1e-6
    assert key(selector=selector) != before


def test_a_pickled_condition_keeps_its_key() -> None:
    trigger = when(is_even)
    assert key(trigger=pickle.loads(pickle.dumps(trigger))) == key(trigger=trigger)
    assert key(trigger=when(is_even)) != key(trigger=trigger)


def is_even(proposal: Proposal) -> bool:
    return len(proposal.prefix) % 2 == 0


def test_arguments_of_a_call_count_by_their_content() -> None:
    model = ChatS2T(model=SLM)
    reply, other = create_model("Reply", a=(int, ...)), create_model("Reply", a=(str, ...))
    assert cache_key(model, response_format=reply) != cache_key(model, response_format=other)
    assert cache_key(model, response_format=reply) == cache_key(
        model, response_format=create_model("Reply", a=(int, ...))
    )
    assert cache_key(model, model=named("slm", 1)) != cache_key(model, model=named("slm", 2))
    assert cache_key(model, template_args={"on": {"b", "a"}}) == cache_key(model, template_args={"on": {"a", "b"}})
    for call in ({"model": named("slm", 1)}, {"template_args": {"now": lambda: 1}}, {"response_format": reply}):
        assert not re.search(r"0x[0-9a-f]{6,}", cache_key(model, **call))


def test_a_chat_model_without_a_key_of_its_own_serves_as_judge() -> None:
    class Odd(FakeListChatModel):
        def with_structured_output(self, schema: Any, **kwargs: Any) -> Any:
            return self

        def _get_llm_string(self, *args: Any, **kwargs: Any) -> str:
            raise TypeError("no key")

    one, other = ChatJudge(Odd(responses=["1"])), ChatJudge(Odd(responses=["1"]))
    assert key(escalation=one) == key(escalation=one) != key(escalation=other)


def test_what_is_loaded_in_use_does_not_change_the_key(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    llm = OpenAILLM(URL, "m", tokenizer=tmp_path)
    before = key(escalation=llm)
    assert llm.given_tokenizer().eos_token_id == tiny_tokenizer().eos_token_id
    assert key(escalation=llm) == before == key(escalation=OpenAILLM(URL, "m", tokenizer=tmp_path))


def test_two_conditions_never_share_a_cached_answer() -> None:
    cache = InMemoryCache()
    asks = {
        "model": SLM,
        "max_tokens": 4,
        "cache": cache,
        "escalation": Escalation(ScriptedLLM(last_candidate), margin=1),
    }
    greedy = ChatS2T(trigger=when(lambda _: False), **asks).invoke("hello")
    corrected = ChatS2T(trigger=when(lambda _: True), **asks).invoke("hello")
    assert greedy.response_metadata["s2t"]["escalations"] == 0
    assert corrected.response_metadata["s2t"]["escalations"] == 4
