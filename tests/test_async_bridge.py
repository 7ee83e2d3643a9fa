"""Blocking generators under asyncio: concurrency, queueing, and cancellation without leftover work."""

from __future__ import annotations

import asyncio
import math
import os
import textwrap
import threading
import time
from collections.abc import Awaitable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import forked
import pytest
from langchain_core.messages import AIMessage
from torch_models import watched_forwards

from s2t_agents import ChatS2T
from s2t_agents.chat import async_bridge as offload
from s2t_agents.chat.async_bridge import ThreadedIterator
from s2t_agents.errors import Overloaded
from s2t_agents.scheduling.admission import Concurrency
from s2t_agents.testing import tiny_model


def busy(**limits: float) -> ChatS2T:
    """A model that one generation at a time may use."""
    return ChatS2T(model=tiny_model(), max_tokens=4, concurrency=Concurrency(running=1, **limits))  # type: ignore[arg-type]


async def test_more_generations_run_at_once_than_the_loops_own_executor_has_threads() -> None:
    everybody = threading.Barrier(24, timeout=20)

    def meet() -> Generator[int, None, None]:
        yield everybody.wait()

    async def one() -> int:
        (number,) = [number async for number in ThreadedIterator(meet())]
        return number

    assert sorted(await asyncio.gather(*[one() for _ in range(24)])) == list(range(24))


async def test_leaving_early_closes_the_generator_before_control_comes_back() -> None:
    closed = False

    def count() -> Generator[int, None, None]:
        nonlocal closed
        try:
            yield from range(10)
        finally:
            closed = True

    async with aclosing(ThreadedIterator(count())) as items:
        async for item in items:
            if item == 3:
                break
    assert closed


async def test_however_often_it_is_cancelled_control_comes_back_when_the_generator_is_closed() -> None:
    begun, go, closed = threading.Event(), threading.Event(), False

    def slow() -> Generator[int, None, None]:
        nonlocal closed
        try:
            begun.set()
            go.wait(20)
            yield 1
        finally:
            time.sleep(0.05)
            closed = True

    async def drain() -> None:
        async with aclosing(ThreadedIterator(slow())) as items:
            async for _ in items:
                pass

    task = asyncio.create_task(drain())
    await asyncio.to_thread(begun.wait, 20)
    for _ in range(5):  # as anyio's scopes do, at every turn of the loop
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    go.set()
    while not task.done():
        task.cancel()
        await asyncio.sleep(0.001)
    assert task.cancelled()
    assert closed


async def test_a_cancellation_while_the_generator_closes_is_not_lost() -> None:
    closing, go, closed = threading.Event(), threading.Event(), False

    def slow() -> Generator[int, None, None]:
        nonlocal closed
        try:
            yield from range(10)
        finally:
            closing.set()
            go.wait(20)
            closed = True

    async def take_one() -> None:
        async with aclosing(ThreadedIterator(slow())) as items:
            await anext(items)

    task = asyncio.create_task(take_one())
    await asyncio.to_thread(closing.wait, 20)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert closed


async def test_an_answer_goes_on_while_the_event_loop_does_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "TURN_S", 20.0)
    taken = 0

    def answer() -> Generator[int | None, None, None]:
        nonlocal taken
        for _ in range(20):
            taken += 1
            yield None
        yield 1

    async with aclosing(ThreadedIterator(answer())) as items:
        first = asyncio.ensure_future(anext(items))
        await asyncio.sleep(0)
        patience = time.monotonic() + 20
        while taken < 20 and time.monotonic() < patience:
            time.sleep(0.001)  # the loop is blocked: no step may need it
        assert taken == 20
        assert await first == 1


async def test_a_cancelled_answer_takes_no_step_more_than_the_one_it_is_at() -> None:
    at, go, taken = threading.Event(), threading.Event(), 0

    def answer() -> Generator[int | None, None, None]:
        nonlocal taken
        while True:
            taken += 1
            at.set()
            go.wait(20)
            yield None

    async def ask() -> None:
        async with aclosing(ThreadedIterator(answer())) as items:
            await anext(items)

    task = asyncio.create_task(ask())
    await asyncio.to_thread(at.wait, 20)
    task.cancel()
    await asyncio.sleep(0.01)
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert taken == 1


async def test_an_error_comes_through() -> None:
    def fail() -> Generator[int, None, None]:
        yield 1
        raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        _ = [item async for item in ThreadedIterator(fail())]


async def test_async_answers_share_forwards_and_equal_those_alone() -> None:
    model = ChatS2T(max_tokens=24)
    questions = [f"Ann has {number} shells and finds 48 more. How many are there now?" for number in range(30, 42)]
    alone = [model.invoke(question).content for question in questions]
    sizes: list[int] = []
    watched_forwards(model.engine.slm, lambda batch: sizes.append(len(batch)))
    assert [answer.content for answer in await model.abatch(questions)] == alone
    assert max(sizes) > 6  # the event loop's own six threads would not do


# ---------------------------------------------------------------------- the queue before the model


async def test_who_waits_for_a_turn_holds_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ChatS2T(model=tiny_model(), max_tokens=4, concurrency=Concurrency(running=2, wait_s=60))
    with ThreadPoolExecutor(4) as few:
        monkeypatch.setattr(offload, "_executor", few)
        answers = await model.abatch(["hello"] * 24, return_exceptions=True)
    assert {type(answer) for answer in answers} == {AIMessage}
    assert max(answer.response_metadata["s2t"]["latency_ms"]["queue"] for answer in answers) > 0


async def test_who_is_cancelled_in_the_queue_leaves_it_at_once() -> None:
    model = busy(waiting=1, wait_s=math.inf)
    async with aclosing(model.astream("hello")) as stream:
        await anext(stream)
        for _ in range(2):  # the second finds the one place free again
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(model.ainvoke("hello"), 0.1)
    assert isinstance(await model.ainvoke("hello"), AIMessage)


@pytest.mark.parametrize(
    ("limits", "said"),
    [({"waiting": 0}, "1 generations run and 0 wait"), ({"wait_s": 0.05}, r"no slot became free within 0\.05 seconds")],
)
async def test_a_full_queue_and_a_long_wait_say_so_under_asyncio_too(limits: dict[str, float], said: str) -> None:
    model = busy(**limits)
    async with aclosing(model.astream("hello")) as stream:
        await anext(stream)
        with pytest.raises(Overloaded, match=said):
            await model.ainvoke("hello")
    assert isinstance(await model.ainvoke("hello"), AIMessage)


async def test_streams_that_waited_show_nothing_of_it() -> None:
    model = busy()
    alone = [chunk.content for chunk in model.stream("hello")]

    async def behind(stream: Awaitable[list[Any]]) -> list[Any]:
        """What a stream shows that begins while another is in the way, and goes on when that has left."""
        async with aclosing(model.astream("hello")) as holder:
            await anext(holder)
            waiting = asyncio.ensure_future(stream)
            while not model.engine.admission.queued:
                await asyncio.sleep(0.001)
        return await waiting

    async def in_a_task() -> list[Any]:
        return [chunk.content async for chunk in model.astream("hello")]

    def in_a_thread() -> list[Any]:
        return [chunk.content for chunk in model.stream("hello")]

    assert await behind(in_a_task()) == alone
    assert await behind(asyncio.to_thread(in_a_thread)) == alone


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_has_threads_of_its_own() -> None:
    script = """
        import asyncio, os, signal
        from s2t_agents.chat.async_bridge import ThreadedIterator

        async def count():
            return [number async for number in ThreadedIterator(up_to(3))]

        def up_to(number):
            yield from range(number)

        assert asyncio.run(count()) == [0, 1, 2]
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            os._exit(0 if asyncio.run(count()) == [0, 1, 2] else 1)
        raise SystemExit(os.waitpid(child, 0)[1])
    """
    assert forked.run("-c", textwrap.dedent(script)).returncode == 0
