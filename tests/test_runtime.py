"""What chat calls share behind a chat model."""

import pickle
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from langchain_core.runnables import ConfigurableField

from s2t_agents import ChatS2T
from s2t_agents.chat import runtime
from s2t_agents.chat.engine_settings import EngineSettings
from s2t_agents.chat.messages import PromptEncoder
from s2t_agents.chat.recent import Recent
from s2t_agents.chat.response_options import ResponseOptions
from s2t_agents.grammar.grammar import CompiledGrammar
from s2t_agents.grammar.vocabulary import Vocabulary
from s2t_agents.testing import tiny_model


def tool(name: str) -> dict[str, Any]:
    return {"name": name, "description": "", "parameters": {"type": "object", "properties": {}}}


def test_a_grammar_in_use_is_compiled_once_however_many_others_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    real = ResponseOptions.compile

    def noted(self: ResponseOptions, vocabulary: Vocabulary) -> CompiledGrammar:
        compiled.append(self.tools[0]["function"]["name"])
        return real(self, vocabulary)

    monkeypatch.setattr(ResponseOptions, "compile", noted)
    monkeypatch.setattr(runtime, "MAX_GRAMMARS", 6)
    chat = ChatS2T(model="s2t-demo", max_tokens=1)
    question = [HumanMessage("2 + 2?")]
    for other in range(8):
        chat.bind_tools([tool("mine")]).invoke(question)
        chat.bind_tools([tool(f"other_{other}")]).invoke(question)
    assert compiled.count("mine") == 1
    chat.bind_tools([tool("other_0")]).invoke(question)
    assert compiled.count("other_0") == 2  # not kept for ever


# ------------------------------------------------------------------ engines


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models of every engine that is built, in order."""
    models: list[Any] = []
    real = runtime.build

    def noted(settings: EngineSettings) -> runtime.Runtime:
        models.append(settings.model)
        return real(settings)

    monkeypatch.setattr(runtime, "build", noted)
    return models


def test_a_models_own_engine_stays_whatever_other_models_its_calls_name(built: list[Any]) -> None:
    own, *others = (tiny_model() for _ in range(8))
    chat = ChatS2T(model=own, max_tokens=1)
    for other in others:
        chat.invoke("hello")
        chat.invoke("hello", model=other)
    assert built == [own, *others]


COPIES: dict[str, Callable[[ChatS2T, int], Any]] = {
    "model_copy": lambda chat, k: chat.model_copy(update={"k": k}),
    "configurable_fields": lambda chat, k: chat.configurable_fields(k=ConfigurableField(id="k")).with_config(
        configurable={"k": k}
    ),
}


@pytest.mark.parametrize("first", [False, True], ids=["copies first", "itself first"])
@pytest.mark.parametrize("how", COPIES)
def test_a_models_own_engine_stays_whatever_its_copies_run(how: str, first: bool, built: list[Any]) -> None:
    chat = pickle.loads(pickle.dumps(ChatS2T(model="s2t-demo", max_tokens=1)))
    if first:
        chat.invoke("hello")
    for k in range(1, 9):
        COPIES[how](chat, k).invoke("hello")
    engine = chat.engine
    for k in range(9, 17):
        COPIES[how](chat, k).invoke("hello")
    assert chat.engine is engine
    assert len(built) == 17


def test_an_engine_in_use_is_built_once_and_others_are_not_kept_for_ever(built: list[Any]) -> None:
    chat, often, *others = ChatS2T(model=tiny_model(), max_tokens=1), *(tiny_model() for _ in range(8))
    for other in others:
        chat.invoke("hello", model=often)
        chat.invoke("hello", model=other)
    assert built == [often, *others]
    assert len(chat.runtimes) < runtime.MAX_ENGINES
    chat.invoke("hello", model=others[0])
    assert built[-1] is others[0]


def test_threads_share_what_template_arguments_need(monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(2)
    made: list[Any] = []
    real = PromptEncoder.with_template_args

    def noted(self: PromptEncoder, args: Any) -> PromptEncoder:
        made.append(args)
        with suppress(threading.BrokenBarrierError):
            together.wait(0.2)  # for another thread that makes the same
        return real(self, args)

    monkeypatch.setattr(PromptEncoder, "with_template_args", noted)
    chat = ChatS2T(model="s2t-demo", max_tokens=1)
    threads = [
        threading.Thread(target=chat.invoke, args=("hello",), kwargs={"template_args": {"a": 1}}) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert made == [{"a": 1}]


def test_recent_values_are_kept_by_equality_and_an_error_keeps_nothing() -> None:
    recent = Recent[list[int], object](2)
    one = recent.get([1], object)
    with pytest.raises(ZeroDivisionError):
        recent.get([2], lambda: 1 / 0)
    recent.get([2], object)
    assert recent.get([1], object) is one
    recent.get([3], object)
    assert recent.get([1], object) is one
    assert len(recent) == 2


def test_a_value_that_takes_long_keeps_nobody_from_another() -> None:
    recent, begun, goes_on = Recent[str, str](4), threading.Event(), threading.Event()
    made: list[str] = []

    def slowly() -> str:
        begun.set()
        goes_on.wait(60)
        made.append("slow")
        return "slow"

    recent.get("kept", lambda: "kept")
    threads = [threading.Thread(target=recent.get, args=("slow", slowly)) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert begun.wait(60)
    assert (recent.get("kept", lambda: ""), recent.get("new", lambda: "new")) == ("kept", "new")
    goes_on.set()
    for thread in threads:
        thread.join(60)
    assert made == ["slow"]


def test_a_value_that_is_made_after_anothers_error_is_kept_too() -> None:
    recent, waits, made = Recent[str, object](2), threading.Event(), list[object]()

    def fails() -> object:
        waits.wait(60)
        raise MemoryError

    def first() -> None:
        with pytest.raises(MemoryError):
            recent.get("key", fails)

    threads = [threading.Thread(target=first)]
    threads[0].start()
    while not len(recent):
        time.sleep(0.001)
    threads += [threading.Thread(target=lambda: made.append(recent.get("key", object))) for _ in range(2)]
    for thread in threads[1:]:
        thread.start()
    waits.set()
    for thread in threads:
        thread.join(60)
    assert {id(each) for each in made} == {id(recent.get("key", object))}
