"""The ``openai`` package as a client of ``s2t serve``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from pydantic import BaseModel
from server_support import QUESTION, STOCK_QUESTION, STOCK_TOOL, demo_model, serving_chat

from s2t_agents import Budget, Concurrency, Escalation, Ledger
from s2t_agents.server import Tenants
from s2t_agents.server.tenants import AgentEntry, AgentLimits, new_key
from s2t_agents.testing import ScriptedLLM
from s2t_agents.triggers import when

openai = pytest.importorskip("openai")

ASK: dict[str, Any] = {"model": "s2t-demo", "messages": [{"role": "user", "content": QUESTION}]}
KEY, LINE = new_key()


@pytest.fixture(scope="module")
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture(scope="module")
def url(ledger: Ledger) -> Iterator[str]:
    with serving_chat(demo_model(ledger=ledger)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=url, api_key="unused") as client:
        yield client


class Sum(BaseModel):
    total: int
    unit: Literal["shells", "lamps"]


def test_answers_streams_and_models_are_typed(client: Any) -> None:
    answer = client.chat.completions.create(**ASK)
    text = answer.choices[0].message.content
    assert text
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0
    assert answer.s2t["trace_id"]
    stream = client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    assert [model.id for model in client.models.list()] == ["s2t-demo"]
    assert client.completions.create(model="s2t-demo", prompt="Ann has 37 shells and finds 48").choices[0].text


def test_its_helpers_accumulate_parse_and_call(client: Any) -> None:
    parsed = client.chat.completions.parse(**ASK, response_format=Sum)
    assert isinstance(parsed.choices[0].message.parsed, Sum)
    asked = [{"role": "user", "content": STOCK_QUESTION}]
    tool = {**STOCK_TOOL, "function": {**STOCK_TOOL["function"], "strict": True}}
    tool["function"]["parameters"] = {**tool["function"]["parameters"], "additionalProperties": False}
    with client.chat.completions.stream(model="s2t-demo", messages=asked, tools=[tool]) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls[0].function.parsed_arguments == {"item": "lamps"}
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "85"}
    after = client.chat.completions.create(model="s2t-demo", messages=[*asked, message, result], tools=[tool])
    assert after.choices[0].message.content.endswith("The answer is 94.")


class Joke(BaseModel):
    """A joke to tell the user."""

    setup: str
    punchline: str
    rating: int | None = None


@pytest.mark.parametrize("limit", [{}, {"max_tokens": 40}, {"max_completion_tokens": 24}])
def test_a_form_that_the_model_would_never_end_is_whole(client: Any, limit: dict[str, int]) -> None:
    told = {"model": "s2t-demo", "messages": [{"role": "user", "content": "Tell me a joke about cats."}], **limit}
    answer = client.chat.completions.parse(**told, response_format=Joke)
    assert isinstance(answer.choices[0].message.parsed, Joke)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.s2t["shortened"] is True
    with client.chat.completions.stream(**told, response_format=Joke) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == answer.choices[0].message.parsed


def test_errors_are_its_own(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**ASK, n=2)
    assert (refused.value.param, refused.value.code) == ("n", "unsupported_parameter")
    assert refused.value.request_id
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**{**ASK, "model": "gpt"})
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="s2t-demo", messages=[{"role": "user", "content": "x " * 3000}])
    assert refused.value.code == "context_length_exceeded"


def test_a_budget_that_is_gone_is_asked_once_and_a_full_queue_again() -> None:
    llm = ScriptedLLM(lambda ids, candidates: [-0.1 * at for at in range(len(candidates))])
    ledger = Ledger()
    limits = AgentLimits(escalations=0, on_exhausted="raise")
    tenants = Tenants({"poor": AgentEntry(keys=[LINE], budget=limits)}, parent=Budget(escalations=9))
    chat_model = demo_model(
        escalation=Escalation(llm, margin=1.0),
        trigger=when(lambda proposal: True),
        ledger=ledger,
        concurrency=Concurrency(running=1, waiting=0),
    )
    with serving_chat(chat_model, tenants=tenants) as url:
        with openai.OpenAI(base_url=url, api_key=KEY) as client, pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(**ASK)
        assert refused.value.code == "insufficient_quota"
        assert len(ledger.records()) == 1
        with openai.OpenAI(base_url=url, api_key="s2t-wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()


async def test_a_stream_that_is_left_stops(url: str, ledger: Ledger) -> None:
    async with openai.AsyncOpenAI(base_url=url, api_key="unused") as client:
        before = len(ledger.records())
        async with await client.chat.completions.create(
            **ASK, stream=True, extra_headers={"X-S2T-Agent": "left"}
        ) as got:
            async for _ in got:
                break
        until = time.monotonic() + 20
        while len(ledger.records()) == before and time.monotonic() < until:
            await asyncio.sleep(0.02)
    assert ledger.records()[-1].agent == "left"


async def test_many_at_once_get_their_own_answers(url: str) -> None:
    questions = [f"Ann has {number} shells and finds 48 more. How many are there now?" for number in (31, 42, 53, 64)]
    async with openai.AsyncOpenAI(base_url=url, api_key="unused") as client:

        async def ask(question: str) -> str:
            messages = [{"role": "user", "content": question}]
            answer = await client.chat.completions.create(model="s2t-demo", messages=messages)
            return str(answer.choices[0].message.content)

        together = await asyncio.gather(*map(ask, questions))
        assert together == [await ask(question) for question in questions]
    assert all(text.startswith(question.split()[2]) for text, question in zip(together, questions, strict=True))
