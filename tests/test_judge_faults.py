"""Faults of a judge: which count against its circuit breaker, and which against the question."""

import asyncio
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import CancelledError
from decimal import Decimal
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.runnables import Runnable, RunnableLambda
from test_judge import PROMPT, answer, first_shown, judge, prefix_of, raises

from s2t_agents import Budget, ChatJudge, TokenPrice
from s2t_agents.errors import (
    ConfigError,
    ContextOverflow,
    EndpointBusy,
    EndpointRefused,
    EscalationFailed,
    ModelNotFound,
    OutOfTime,
    QuestionRefused,
)
from s2t_agents.llms import CircuitBreaker, Question
from s2t_agents.llms import judge as module
from s2t_agents.testing import tiny_model
from s2t_agents.triggers import always
from s2t_agents.types import Price


class Hours:
    """A clock that stands still until it is moved."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Declined(Exception):
    """As the clients of OpenAI and Anthropic raise it."""

    def __init__(self, status_code: int, **headers: str) -> None:
        super().__init__("declined")
        self.status_code = status_code
        self.response = httpx.Response(status_code, headers={key.replace("_", "-"): headers[key] for key in headers})


@pytest.fixture
def release() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def question(seconds: float | None = None) -> Question:
    return Question(PROMPT, [65, 66, 67], prefix=prefix_of(tiny_model()), seconds=seconds)


def test_a_provider_that_says_when_to_come_back_is_left_alone_until_then() -> None:
    clock = Hours()
    llm = judge(raises(Declined(429, Retry_After="120")), breaker=CircuitBreaker(cooldown_s=30, clock=clock))
    with pytest.raises(EndpointBusy) as caught:
        llm.open().ask(question())
    assert caught.value.wait_s == 120
    clock.now += 119
    assert llm.breaker.state == "open"
    clock.now += 1
    assert llm.breaker.state == "half-open"


def test_a_provider_that_says_nothing_of_when_is_asked_again() -> None:
    llm = judge(raises(Declined(429)))
    with pytest.raises(EndpointBusy):
        llm.open().ask(question())
    assert llm.breaker.state == "closed"


@pytest.mark.parametrize(
    ("error", "raised", "state"),
    [
        (Declined(400), QuestionRefused, "closed"),
        (Declined(413), QuestionRefused, "closed"),
        (ContextOverflow("600 tokens; 511 fit"), QuestionRefused, "closed"),
        (Declined(401), EndpointRefused, "open"),
        (ModelNotFound("no such model"), EndpointRefused, "open"),
    ],
)
def test_only_what_would_meet_every_question_closes_it_to_others(
    error: Exception, raised: type[EndpointRefused], state: str
) -> None:
    llm = judge(raises(error))
    for _ in range(3):
        with pytest.raises(raised) as caught:
            llm.open().ask(question())
        assert type(caught.value) is raised
    assert llm.breaker.state == state


def test_a_caller_without_time_does_not_close_it_to_others(release: threading.Event) -> None:
    def late(text: str) -> int:
        release.wait(20)
        return 1

    llm = judge(late)
    for _ in range(3):
        with pytest.raises(OutOfTime):
            llm.open().ask(question(seconds=0.05))
    release.set()
    assert llm.open().ask(question()).scores


def test_previews_that_run_out_of_memory_do_not_take_the_answer_down(monkeypatch: pytest.MonkeyPatch) -> None:
    def starved(*given: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(module, "previews", starved)
    budget = Budget(usd="1", escalations=9)
    steps = answer(judge(first_shown), always(), budget)
    assert {step.escalation.outcome for step in steps if step.escalation} == {"failed"}
    assert "out of memory" in steps[0].escalation.reason  # type: ignore[union-attr]
    assert [step.token_id for step in steps] == [step.wanted_id for step in steps]
    assert (budget.state().spent["escalations"], budget.state().holds) == (0, 0)


# ---------------------------------------------------------------------- replies that nobody checked


class Unchecked(BaseChatModel):
    """A chat model whose structured output is whatever it was given: gateways and subclasses do that."""

    reply: Any = None

    @property
    def _llm_type(self) -> str:
        return "unchecked"

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def with_structured_output(self, schema: Any, **kwargs: Any) -> Runnable[Any, Any]:
        return RunnableLambda(self.said)

    def said(self, messages: Any) -> Any:
        if isinstance(self.reply, BaseException):
            raise self.reply
        return self.reply


class Broken:
    """An object whose attributes break down."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("sk-SECRET")

    def __repr__(self) -> str:  # the test's name, which every worker has to collect alike
        return "Broken()"


class Numbers(IntEnum):
    FAR = 99


def named(number: Any) -> dict[str, Any]:
    return {"parsed": SimpleNamespace(number=number)}


USELESS: list[Any] = [
    *(None, [], "text", 1, {}, {"parsed": None}, SimpleNamespace(number=1), Broken(), AIMessage("1")),
    *({"parsed": 1}, {"parsed": [1]}, {"parsed": {"number": 1}}, {"parsed": {"number": {"number": 1}}}),
    *({"parsed": SimpleNamespace()}, {"parsed": Broken()}, {"number": 1}),
    *map(named, (None, 0, -1, 99, 2**70, "1", "x", True, 1.0, 1.5, float("nan"), float("inf"), [1], Numbers.FAR)),
    {"raw": SimpleNamespace(usage_metadata={}), "parsed": SimpleNamespace(number=0)},
]


def useless(reply: Any) -> None:
    """The local pick stands at every step, and every question says why it failed."""
    llm = ChatJudge(Unchecked(reply=reply), price=TokenPrice(1, 1), timeout_s=20)
    steps = answer(llm, always(), Budget(escalations=100))
    assert [step.picked_by for step in steps] == ["slm"] * len(steps)
    outcomes = [step.escalation.outcome for step in steps if step.escalation]
    assert outcomes
    assert set(outcomes) == {"failed"}
    assert not any("sk-SECRET" in step.escalation.reason for step in steps if step.escalation)


@pytest.mark.parametrize("reply", USELESS, ids=repr)
def test_a_reply_that_names_no_continuation_leaves_the_local_pick(reply: Any) -> None:
    useless(reply)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["parsed", "raw", "number", "x"]), inner),
        max_leaves=6,
    )
)
@settings(max_examples=15, deadline=None)
def test_no_json_for_a_reply_takes_the_answer_down(reply: Any) -> None:
    useless(reply)


@pytest.mark.parametrize(
    "error",
    [
        *(
            ValueError("sk-SECRET"),
            OutputParserException("sk-SECRET"),
            KeyError("x"),
            AssertionError(),
            StopIteration(),
        ),
        *(
            TimeoutError("sk-SECRET"),
            RecursionError(),
            MemoryError(),
            NotImplementedError(),
            type("Odd", (Exception,), {})(),
        ),
        type("Hostile", (Exception,), {"status_code": property(lambda self: 1 / 0), "response": 3})(),
        type("Truthy", (Exception,), {"status_code": True})(),
        type("Headers", (Exception,), {"status_code": 429, "response": Broken()})(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_chat_model_raises_leaves_the_local_pick(error: Exception) -> None:
    useless(error)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="a signal of one's own")
@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, asyncio.CancelledError])
def test_an_interruption_of_the_caller_is_no_fault_of_the_judge_and_passes(
    stop: type[BaseException], release: threading.Event
) -> None:
    def interrupted(*_: object) -> None:
        raise stop

    def late(text: str) -> int:
        os.kill(os.getpid(), signal.SIGUSR1)  # Python's handlers run in the main thread, which waits for the judge
        release.wait(20)
        return 1

    before = signal.signal(signal.SIGUSR1, interrupted)
    try:
        with pytest.raises(stop):
            judge(late).open().ask(question())
    finally:
        signal.signal(signal.SIGUSR1, before)


STOPS = [KeyboardInterrupt(), SystemExit(3), GeneratorExit(), asyncio.CancelledError(), CancelledError()]
STOPS += [BaseExceptionGroup("all", [SystemExit(3)]), type("Own", (BaseException,), {})()]


@pytest.mark.parametrize("stop", STOPS, ids=lambda stop: type(stop).__name__)
def test_what_stops_the_judges_own_thread_leaves_the_local_pick(stop: BaseException) -> None:
    def stopped(self: object, *_: object) -> Any:
        raise stop

    broken = type("Broken", (), {"number": property(stopped)})()
    useless(stop)
    useless({"parsed": broken})
    useless(type("Status", (Exception,), {"status_code": property(stopped), "response": broken})())


def test_what_a_useless_reply_says_that_it_cost_is_paid() -> None:
    raw = AIMessage("", usage_metadata={"input_tokens": 200, "output_tokens": 9, "total_tokens": 209})
    llm = ChatJudge(Unchecked(reply={"raw": raw, "parsed": None}), price=TokenPrice(1, 1))
    steps = answer(llm, always(), budget := Budget(usd=1))
    asked = [step.escalation for step in steps if step.escalation and step.escalation.actual]
    assert {report.actual.llm_tokens for report in asked if report.actual} == {209}
    assert budget.state().spent["llm_tokens"] == 209 * len(asked)


@pytest.mark.parametrize(
    "usage",
    [{}, {"input_tokens": "many"}, {"input_tokens": -1, "output_tokens": 2}, {"input_tokens": 1.5, "output_tokens": 2},
     {"input_tokens": 9, "output_tokens": 2, "input_token_details": None}, {"input_tokens": 9, "output_tokens": 10**9},
     {"input_tokens": 9, "output_tokens": 2, "input_token_details": {"cache_read": "x"}}, [1], 7,
     {"input_tokens": 9, "output_tokens": 2, "input_token_details": {"cache_creation": "x"}},
     {"input_tokens": 9, "output_tokens": 2, "input_token_details": {"ephemeral_1h_input_tokens": 1.5}}],
)  # fmt: skip
def test_a_usage_that_cannot_be_believed_is_billed_at_the_worst_or_its_own_sum(usage: Any) -> None:
    raw = AIMessage.model_construct(content="", usage_metadata=usage)
    llm = ChatJudge(Unchecked(reply={"raw": raw, "parsed": SimpleNamespace(number=1)}), price=TokenPrice(1, 1))
    session, asked = llm.open(), question()
    worst = session.quote(asked)
    session.ask(asked)
    assert asked.owed is not None
    assert worst is not None
    assert 0 < asked.owed.llm_tokens <= worst.llm_tokens
    Budget().reserve(asked.owed).settle(asked.owed)


class PassesOn:
    """Hands its arguments to another price, which knows nothing of what is written to a cache."""

    def cost(self, **counts: int) -> Decimal:
        return OwnPrice().cost(**counts)


class OwnPrice:
    """Knows nothing of what is written to a cache."""

    def cost(self, *, input_tokens: int, cached_tokens: int = 0, output_tokens: int = 0) -> Decimal:
        return Decimal(input_tokens - cached_tokens + 2 * output_tokens)


PRICES = [
    TokenPrice(3, 15, 0.3),
    TokenPrice(3, 15, 0.3, cache_write_usd_per_mtok=3.75, cache_write_1h_usd_per_mtok=6),
    TokenPrice(3, 15, cache_write_usd_per_mtok=4),
    TokenPrice(3, 15, 0.3, cache_write_usd_per_mtok=1),  # writing is cheaper than reading
    TokenPrice(1, 15, 2),
    TokenPrice(1, 2, long_prompts=((100, TokenPrice(2, 4, cache_write_usd_per_mtok=5)),)),
    OwnPrice(),
    PassesOn(),
]


@pytest.mark.parametrize("price", PRICES, ids=range(len(PRICES)))
@pytest.mark.parametrize(
    "kind", ["none", "cache_read", "cache_creation", "ephemeral_5m_input_tokens", "ephemeral_1h_input_tokens"]
)
def test_what_is_held_covers_a_prompt_that_was_all_read_or_written(kind: str, price: Price) -> None:
    chat = Unchecked()
    llm = ChatJudge(chat, price=price)
    session, asked = llm.open(), question()
    held = session.quote(asked)
    assert held is not None
    assert held.usd is not None
    read = held.llm_tokens - llm.reply_tokens
    usage = {"input_tokens": read, "output_tokens": llm.reply_tokens, "input_token_details": {kind: read}}
    raw = AIMessage.model_construct(content="", usage_metadata=usage)
    chat.reply = {"raw": raw, "parsed": SimpleNamespace(number=1)}
    session.ask(asked)
    assert asked.owed is not None
    assert asked.owed.usd is not None
    assert 0 < asked.owed.usd <= held.usd


def test_a_providers_error_brings_no_chain_along() -> None:
    llm = ChatJudge(Unchecked(reply=ValueError("sk-" + "SECRET")), price=TokenPrice(1, 1))
    with pytest.raises(EscalationFailed) as caught:
        llm.open().ask(question())
    assert "sk-SECRET" not in "".join(traceback.format_exception(caught.value))
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


class Formless(Unchecked):
    def with_structured_output(self, schema: Any, **kwargs: Any) -> Runnable[Any, Any]:
        raise TypeError("unexpected keyword argument 'include_raw'")


def test_a_chat_model_that_takes_no_form_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"Formless has no structured output \(TypeError\)"):
        ChatJudge(Formless(), price=TokenPrice(1, 1))
