"""``timeout=``: seconds for a whole answer, in the queue, in the prompt, between tokens and in questions to the LLM."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import servers
from langchain_core.exceptions import ModelTimeoutError
from observers import cache_key, traced
from servers import CompletionServer
from torch_models import slot_taken, watched_forwards

from s2t_agents import Budget, ChatS2T, Concurrency, Ledger
from s2t_agents.budget import TokenPrice
from s2t_agents.chat.unfinished_answers import Unfinished
from s2t_agents.errors import AnswerTimeout, ConfigError, S2TError
from s2t_agents.llms.question import Answer, Question
from s2t_agents.testing import ScriptedLLM, last_candidate, tiny_model
from s2t_agents.triggers import always

MODELS = ["qwen3", "llama", "qwen3_next"]
TOKENS, TIMEOUT_S = 12, 0.5
SLOW_AT = 2
"""The step after which the consumer takes longer than the timeout."""


def slow(trace: str, step: Any) -> None:
    if step.index == SLOW_AT:
        time.sleep(TIMEOUT_S + 0.1)


def chat(model: str = "qwen3", **settings: Any) -> ChatS2T:
    return ChatS2T(model=tiny_model(model), **{"max_tokens": TOKENS, **settings})


async def drained(model: ChatS2T, **call: Any) -> Any:
    return [chunk async for chunk in model.astream("hello", **call)]


HOW: dict[str, Callable[..., Any]] = {
    "invoke": lambda model, **call: model.invoke("hello", **call),
    "stream": lambda model, **call: list(model.stream("hello", **call)),
    "batch": lambda model, **call: model.batch(["hello", "hi"], **call),
    "ainvoke": lambda model, **call: asyncio.run(model.ainvoke("hello", **call)),
    "astream": lambda model, **call: asyncio.run(drained(model, **call)),
    "abatch": lambda model, **call: asyncio.run(model.abatch(["hello", "hi"], **call)),
    "bind": lambda model, **call: model.bind(**call).invoke("hello"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", HOW)
def test_an_answer_ends_at_the_timeout_however_it_is_asked_for(how: str, name: str) -> None:
    ledger, budget = Ledger(), Budget(answer_tokens=100)
    model = chat(name, on_step=slow, ledger=ledger, budget=budget)
    with pytest.raises(AnswerTimeout, match=r"within timeout=0\.5 seconds: .* came\. Give it more time") as late:
        HOW[how](model, timeout=TIMEOUT_S)
    assert isinstance(late.value, S2TError | ModelTimeoutError)
    assert late.value.is_retryable
    records = ledger.records()
    assert {record.finish_reason for record in records} == {"aborted"}
    errors = [record.error or "" for record in records if record.error or how != "abatch"]  # the first cancels others
    assert errors
    assert all(error.startswith("AnswerTimeout: ") for error in errors)
    assert all(record.completion_tokens < TOKENS for record in records)
    state = budget.state()
    assert (state.holds, state.spent["answer_tokens"]) == (0, sum(record.completion_tokens for record in records))


def test_a_call_says_another_timeout_than_the_model() -> None:
    model = chat(on_step=slow, timeout=TIMEOUT_S)
    with pytest.raises(AnswerTimeout):
        model.invoke("hello")
    with pytest.raises(AnswerTimeout):
        model.invoke("hello", timeout=None)
    for timeout in (600, Fraction(600), np.float32(600), math.inf):
        assert model.invoke("hello", timeout=timeout).response_metadata["s2t"]["tokens"] == TOKENS


def test_a_slow_reader_does_not_lose_the_last_token() -> None:
    def slow_at_last(trace: str, step: Any) -> None:
        if step.index == TOKENS - 1:
            time.sleep(3.1)

    model = chat(on_step=slow_at_last, budget=Budget(seconds=600))
    model.engine  # noqa: B018 - loading is not on the clock
    assert model.invoke("hello", timeout=3).response_metadata["s2t"]["tokens"] == TOKENS


@pytest.mark.parametrize("limits", [None, {"seconds": 600}], ids=["alone", "within a budget's"])
@pytest.mark.parametrize("name", MODELS)
def test_a_long_prompt_is_given_up_between_its_chunks(name: str, limits: dict[str, Any] | None) -> None:
    slm, forwards = tiny_model(name), list[Any]()
    budget = None if limits is None else Budget(**limits)  # whose time begins here
    slm.backend.limits = replace(slm.backend.limits, prefill_alone=16, prefill_beside=16)

    def watch(batch: Any) -> None:
        forwards.append(batch)
        time.sleep(TIMEOUT_S)

    watched_forwards(slm, watch)
    ledger = Ledger()
    with pytest.raises(AnswerTimeout, match="no token came"):
        ChatS2T(model=slm, ledger=ledger, timeout=TIMEOUT_S, budget=budget).invoke("word " * 60)
    assert len(forwards) <= 1
    assert [record.completion_tokens for record in ledger.records()] == [0]


@pytest.mark.parametrize("how", ["invoke", "stream", "ainvoke", "astream"])
def test_a_wait_for_a_slot_ends_at_the_timeout(how: str) -> None:
    model = chat(concurrency=Concurrency(running=1, wait_s=math.inf))
    with slot_taken(model), pytest.raises(AnswerTimeout, match="no token came"):
        HOW[how](model, timeout=0.2)


class Asked(ScriptedLLM):
    """Notes how many seconds each question has."""

    def __init__(self) -> None:
        super().__init__(last_candidate, price=TokenPrice(Decimal(1), Decimal(1)))
        self.seconds: list[float | None] = []

    def ask(self, question: Question) -> Answer:
        self.seconds.append(question.seconds)
        return super().ask(question)


@pytest.mark.parametrize("limit_s", [None, 5, 5000])
@pytest.mark.parametrize("timeout", [None, 90])
def test_a_question_has_no_more_seconds_than_the_answer_or_the_budget(
    timeout: float | None, limit_s: float | None
) -> None:
    llm = Asked()
    budget = Budget(escalations=100, seconds=limit_s)
    chat(escalation=llm, trigger=always(), max_tokens=4, budget=budget, timeout=timeout).invoke("hello")
    assert llm.seconds
    least = min((limit for limit in (timeout, limit_s) if limit is not None), default=None)
    for seconds in llm.seconds:
        assert (seconds is None) if least is None else (seconds is not None and 0 < seconds <= least)


def test_questions_of_an_answer_that_was_given_up_are_paid_and_told() -> None:
    ledger, budget = Ledger(), Budget(usd=1, escalations=100)
    model = chat(escalation=Asked(), trigger=always(), budget=budget, ledger=ledger, on_step=slow, timeout=TIMEOUT_S)
    with pytest.raises(AnswerTimeout):
        model.invoke("hello")
    [record] = ledger.records()
    assert record.cost_usd.llm == budget.state().spent["usd"]
    assert record.escalations == budget.state().spent["escalations"] == len(record.receipts)


def test_the_next_try_goes_on_where_the_timeout_ended_the_last() -> None:
    whole, unfinished = chat().invoke("hello"), Unfinished()
    model = chat(on_step=slow)
    with pytest.raises(AnswerTimeout):
        model.invoke("hello", timeout=TIMEOUT_S, s2t_unfinished=unfinished)
    assert model.invoke("hello", timeout=600, s2t_unfinished=unfinished).content == whole.content


@pytest.mark.parametrize(
    "wrong", [0, -1, math.nan, -math.inf, True, False, "30", (5, 30), {"read": 5}, Decimal(3)], ids=repr
)
def test_what_is_no_number_of_seconds_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"timeout is .*must be a number of seconds above 0\. Give what a whole"):
        ChatS2T(model="never/loaded", timeout=wrong)
    with pytest.raises(ConfigError, match="timeout is"):
        chat().invoke("hello", timeout=wrong)


def test_a_timeout_changes_no_answer() -> None:
    assert cache_key(chat(), timeout=5) == cache_key(chat(timeout=3)) == cache_key(chat())
    assert "timeout" not in traced(chat(), timeout=5)


@pytest.mark.parametrize("how", ["invoke", "stream", "ainvoke"])
def test_a_models_own_server_that_says_nothing_is_waited_for_no_longer(server: CompletionServer, how: str) -> None:
    model = ChatS2T(
        model=f"vllm://127.0.0.1:{server.server_port}/{server.model.name}",
        model_kwargs={"tokenizer": server.model.tokenizer, "timeout_s": 60},
        max_tokens=TOKENS,
    )
    model.invoke("hello")
    server.fault = servers.hangs_before_headers
    with pytest.raises(AnswerTimeout, match=r"no token came"):
        HOW[how](model, timeout=TIMEOUT_S)
    server.fault = None
    assert model.invoke("hello").response_metadata["s2t"]["tokens"]  # its breaker is not opened by it


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", ["invoke", "stream", "ainvoke", "astream"])
def test_an_answer_whose_last_token_comes_late_is_whole_however_it_is_asked_for(how: str, name: str) -> None:
    model, batches, late = chat(name, cache_scope="own"), list[Any](), 0

    def watch(batch: list[Any]) -> None:
        batches.append(batch)
        if len(batches) == late:
            time.sleep(TIMEOUT_S + 0.1)

    watched_forwards(model.engine.slm, watch)
    for _ in range(2):  # the second finds its prompt in the prefix cache, as all do behind it
        batches.clear()
        HOW[how](model)
    late = len(batches)
    batches.clear()
    HOW[how](model, timeout=TIMEOUT_S)
    late -= 1
    batches.clear()
    with pytest.raises(AnswerTimeout, match=f"{TOKENS - 1} tokens came"):
        HOW[how](model, timeout=TIMEOUT_S)
