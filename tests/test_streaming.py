"""Streams: early first chunk, complete sums, right costs, and the model stops when the stream is closed."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_core.tools import tool

from s2t_agents import Budget, ChatS2T, Ledger
from s2t_agents.chat.async_bridge import ThreadedIterator
from s2t_agents.escalation import Escalation
from s2t_agents.testing import ScriptedLLM, last_candidate, markov_model, tiny_model
from s2t_agents.triggers import always
from s2t_agents.types import Step
from tests.thinking_models import token, tokenizer_of

LENGTH = 40


class Watch:
    """Counts the steps that the engine has computed."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.third = threading.Event()

    def __call__(self, trace_id: str, step: Step) -> None:
        self.steps.append(step)
        if len(self.steps) == 3:
            self.third.set()


def counts(message: object) -> dict[str, int]:
    """The numbers of tokens, but not how many of them an earlier turn had left."""
    usage: dict[str, int] = message.usage_metadata  # type: ignore[attr-defined]
    return {key: value for key, value in usage.items() if key != "input_token_details"}


def chat(**settings: Any) -> ChatS2T:
    """A random model that writes ``LENGTH`` tokens."""
    model = tiny_model(max_position_embeddings=4096, seed=8)
    return ChatS2T(**{"model": model, "max_tokens": LENGTH, "ledger": Ledger(), "on_step": Watch(), **settings})


def escalating(answer: Callable[[Sequence[int], Sequence[int]], list[float]] = last_candidate) -> ChatS2T:
    """Asks an LLM at every step, on a budget."""
    return chat(trigger=always(), escalation=Escalation(ScriptedLLM(answer), margin=1.0), budget=Budget(escalations=99))


def slowly(ids: Sequence[int], candidates: Sequence[int]) -> list[float]:
    time.sleep(0.02)
    return last_candidate(ids, candidates)


def settled(model: ChatS2T) -> Any:
    """The one aborted record, once it is certain that the books agree with it and nothing is held."""
    assert model.ledger is not None
    assert model.budget is not None
    [record] = model.ledger.records()
    state = model.budget.state()
    assert record.finish_reason == "aborted"
    assert state.held["escalations"] == 0
    assert record.escalations == record.completion_tokens == state.spent["escalations"] == len(model.on_step.steps)
    return record


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def joined(chunks: Sequence[Any]) -> AIMessageChunk:
    whole = sum(chunks[1:], chunks[0])
    assert isinstance(whole, AIMessageChunk)
    return whole


# ---------------------------------------------------------------------- what comes, and when


def test_every_chunk_is_out_before_the_next_token_is_computed() -> None:
    model = chat()
    said = [len(model.on_step.steps) for chunk in model.stream("hello") if chunk.text]
    assert said[0] == 1
    assert said == sorted(set(said))  # no chunk waited for another's token
    assert len(said) > LENGTH / 4


async def test_async_chunks_are_out_as_early() -> None:
    model = chat()
    said = [len(model.on_step.steps) async for chunk in model.astream("hello") if chunk.text]
    assert said[0] == 1
    assert said == sorted(set(said))


@pytest.mark.parametrize("tools", [[], [add]])
async def test_numbers_come_with_the_last_chunk_alone(tools: list[Any]) -> None:
    model = chat(max_tokens=96).bind_tools(tools, tool_choice="any" if tools else None)
    for chunks in (list(model.stream("hello")), [chunk async for chunk in model.astream("hello")]):
        last = len(chunks) - 1
        assert [i for i, chunk in enumerate(chunks) if chunk.usage_metadata] == [last]
        assert [i for i, chunk in enumerate(chunks) if chunk.response_metadata] == [last]
        assert [i for i, chunk in enumerate(chunks) if chunk.chunk_position == "last"] == [last]
        assert set(chunks[last].response_metadata) == {"model_name", "model_provider", "finish_reason", "s2t"}
        assert all(isinstance(value, int) for value in counts(chunks[last]).values())


@pytest.mark.parametrize("room", [1, 2])
@pytest.mark.parametrize(("stop", "stopped"), [("<th", True), ("<", True), ("zzz", False)])
def test_a_stop_string_in_text_held_back_to_the_end_ends_an_answer_of_all_its_tokens(
    room: int, stop: str, stopped: bool
) -> None:
    tokenizer = tokenizer_of("letters")
    written = ["<th", "ink"][:room]  # which may be a tag until no more can come
    model = markov_model(tokenizer, ["\n", *(token(tokenizer, piece) for piece in written)])
    model = ChatS2T(model=model, max_tokens=room, stop=[stop])
    for message in (model.invoke("Q"), joined(list(model.stream("Q")))):
        assert message.text == ("" if stopped else "".join(written))
        assert message.response_metadata["finish_reason"] == ("stop" if stopped else "length")


async def test_sync_and_async_whole_and_streamed_say_the_same() -> None:
    model = chat(max_tokens=96).bind_tools([add], tool_choice="any")
    answers: list[AIMessage] = [
        model.invoke("hello"),
        await model.ainvoke("hello"),
        joined(list(model.stream("hello"))),
        joined([chunk async for chunk in model.astream("hello")]),
        chat(max_tokens=96, streaming=True).bind_tools([add], tool_choice="any").invoke("hello"),
    ]
    first = answers[0]
    for answer in answers:
        assert [(call["name"], call["args"]) for call in answer.tool_calls] == [
            (call["name"], call["args"]) for call in first.tool_calls
        ]
        assert (answer.content, counts(answer)) == (first.content, counts(first))


def test_a_call_streams_its_name_and_id_once_and_its_arguments_in_pieces() -> None:
    model = chat(max_tokens=96).bind_tools([add], tool_choice="any")
    chunks = list(model.stream("hello"))
    pieces = [piece for chunk in chunks for piece in chunk.tool_call_chunks]
    assert {piece["index"] for piece in pieces} == {0}
    assert [piece["name"] for piece in pieces if piece["name"]] == ["add"]
    assert len([piece["id"] for piece in pieces if piece["id"]]) == 1
    assert len(pieces) > 3
    [call] = joined(chunks).tool_calls
    assert set(call["args"]) == {"a", "b"}


async def test_langgraph_streams_tokens_of_the_model() -> None:
    model = chat()
    agent = create_agent(model, name="alpha")
    seen = [
        (len(model.on_step.steps), message)
        async for message, _ in agent.astream({"messages": [HumanMessage("hi")]}, stream_mode="messages")
        if isinstance(message, AIMessageChunk)
    ]
    assert len(seen) > LENGTH / 4
    assert seen[0][0] < LENGTH  # it came while the answer was still being written
    assert [i for i, (_, message) in enumerate(seen) if message.usage_metadata] == [len(seen) - 1]
    list(agent.stream({"messages": [HumanMessage("hi")]}, stream_mode="messages"))
    assert len(model.ledger.records()) == 2


async def test_events_v2_carry_every_chunk_and_the_whole() -> None:
    model = chat()
    events = [event async for event in model.astream_events("hello", version="v2")]
    pieces = [event["data"]["chunk"] for event in events if event["event"] == "on_chat_model_stream"]
    [end] = [event["data"]["output"] for event in events if event["event"] == "on_chat_model_end"]
    assert joined(pieces).content == end.content
    assert end.usage_metadata["output_tokens"] == LENGTH
    assert end.response_metadata["s2t"]["tokens"] == LENGTH


async def test_events_v3_build_the_same_message() -> None:
    model = chat()
    whole = model.invoke("hello")
    stream = model.stream_events("hello", version="v3")
    assert list(stream)
    assert stream.output.text == whole.text
    later = await model.astream_events("hello", version="v3")
    assert [event async for event in later]
    message = await later.output
    assert (message.text, counts(message)) == (whole.text, counts(whole))
    assert message.response_metadata["s2t"]["tokens"] == LENGTH


# ---------------------------------------------------------------------- nobody listens any more


def test_a_closed_stream_stops_within_one_step_and_is_billed() -> None:
    model = escalating()
    stream = model.stream("hello")
    next(stream)
    done = len(model.on_step.steps)
    stream.close()
    assert settled(model).completion_tokens == done


def test_a_dropped_stream_is_a_closed_one() -> None:
    model = escalating()
    for _ in model.stream("hello"):
        break
    settled(model)


async def test_a_closed_async_stream_stops_within_one_step_and_is_billed() -> None:
    model = escalating(slowly)
    stream = model.astream("hello")
    await anext(stream)
    done = len(model.on_step.steps)
    await stream.aclose()
    for _ in range(200):  # LangChain's own generator leaves ours to the loop, which closes it on its next turns
        if model.ledger.records():
            break
        await asyncio.sleep(0.01)
    assert settled(model).completion_tokens <= done + 1


@pytest.mark.parametrize("how", ["ainvoke", "astream", "agent"])
async def test_a_cancelled_task_stops_within_one_step_and_is_billed(how: str) -> None:
    model = escalating(slowly)

    async def work() -> None:
        if how == "ainvoke":
            await model.ainvoke("hello")
        elif how == "agent":
            await create_agent(model, name="alpha").ainvoke({"messages": [HumanMessage("hello")]})
        else:
            async for _ in model.astream("hello"):
                pass

    task = asyncio.create_task(work())
    await asyncio.to_thread(model.on_step.third.wait)
    done = len(model.on_step.steps)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for _ in range(100):
        if model.ledger.records():
            break
        await asyncio.sleep(0.01)
    assert settled(model).completion_tokens <= done + 2
    await asyncio.sleep(0.1)
    settled(model)  # nothing runs on behind


async def leave_messages(model: ChatS2T) -> None:
    agent = create_agent(model, name="alpha")
    async for _ in agent.astream({"messages": [HumanMessage("hi")]}, stream_mode="messages"):
        return


async def leave_events_v2(model: ChatS2T) -> None:
    async for event in model.astream_events("hello", version="v2"):
        if event["event"] == "on_chat_model_stream":
            return


async def leave_events_v3(model: ChatS2T) -> None:
    stream = await model.astream_events("hello", version="v3")
    async for _ in stream:
        break
    await stream.aclose()


@pytest.mark.parametrize("leave", [leave_messages, leave_events_v2, leave_events_v3])
async def test_leaving_a_graph_or_a_stream_of_events_stops_the_model(leave: Callable[[ChatS2T], Any]) -> None:
    model = escalating(slowly)
    await leave(model)
    for _ in range(200):
        if model.ledger.records():
            break
        await asyncio.sleep(0.01)
    assert settled(model).completion_tokens < LENGTH / 2


async def test_a_timeout_is_a_cancellation() -> None:
    model = escalating(slowly)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(model.ainvoke("hello"), timeout=0.2)
    assert 0 < settled(model).completion_tokens < LENGTH


async def test_cancelling_while_the_llm_thinks_settles_its_hold() -> None:
    asked, go = threading.Event(), threading.Event()

    def stuck(ids: Sequence[int], candidates: Sequence[int]) -> list[float]:
        asked.set()
        go.wait(5)
        return last_candidate(ids, candidates)

    model = escalating(stuck)
    task = asyncio.create_task(model.ainvoke("hello"))
    await asyncio.to_thread(asked.wait)
    assert model.budget.state().held["escalations"] == 1
    task.cancel()
    await asyncio.sleep(0.05)
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    state = model.budget.state()
    assert (state.held["escalations"], state.spent["escalations"]) == (0, 1)
    assert len(model.ledger.records()) == 1


async def test_one_cancelled_task_leaves_the_others_alone() -> None:
    model = chat()
    tasks = [asyncio.create_task(model.ainvoke("hello")) for _ in range(3)]
    await asyncio.to_thread(model.on_step.third.wait)
    tasks[0].cancel()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(answers[0], asyncio.CancelledError)
    assert answers[1].content == answers[2].content
    assert {record.finish_reason for record in model.ledger.records()} == {"aborted", "length"}


# ---------------------------------------------------------------------- the bridge to threads


async def test_items_are_computed_on_demand_in_threads_and_errors_come_through() -> None:
    threads: list[int] = []

    def items() -> Any:
        for i in range(3):
            threads.append(threading.get_ident())
            yield i
        raise LookupError("no more")

    numbers = ThreadedIterator(items())
    for i in range(3):
        assert await anext(numbers) == i
        assert len(threads) == i + 1
    with pytest.raises(LookupError, match="no more"):
        await anext(numbers)
    assert threading.get_ident() not in threads


async def test_leaving_closes_the_generator_before_control_is_back() -> None:
    closed = []

    def items() -> Any:
        try:
            yield from range(9)
        finally:
            closed.append(True)

    async with contextlib.aclosing(ThreadedIterator(items())) as numbers:
        async for _ in numbers:
            break
    assert closed == [True]
