"""Nested calls: a call made inside a generation shares its slot, so there is no deadlock."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.messages import AIMessage

from s2t_agents import ChatS2T, Concurrency
from s2t_agents.call_scope import with_current_scopes
from s2t_agents.errors import Overloaded
from s2t_agents.scheduling.admission import DEEPEST
from s2t_agents.testing import tiny_model

TOKENS = 4


def busy(**settings: Any) -> ChatS2T:
    """A model that one generation at a time may use; who waits for a turn waits for long."""
    limits = Concurrency(running=1, wait_s=60)
    return ChatS2T(**{"model": tiny_model(), "max_tokens": TOKENS, "concurrency": limits, **settings})


class Once:
    """Calls the model once, at the first token."""

    def __init__(self, how: Any) -> None:
        self.how, self.said, self.model = how, None, None

    def __call__(self, *_: Any, **__: Any) -> None:
        if self.said is None:
            self.said = "asked"
            self.said = self.how(self.model)


def in_a_loop(model: ChatS2T) -> Any:
    return asyncio.run(model.ainvoke("hello"))


def streamed(model: ChatS2T) -> Any:
    *_, last = model.stream("hello")
    return last


def by_to_thread(model: ChatS2T) -> Any:
    async def ask() -> Any:
        return await asyncio.to_thread(model.invoke, "hello")

    return asyncio.run(ask())


HOW = [lambda model: model.invoke("hello"), in_a_loop, streamed, by_to_thread, lambda model: model.batch(["hello"] * 3)]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("outer", ["invoke", "stream", "ainvoke", "astream"])
def test_a_call_from_on_step_shares_the_slot(how: Any, outer: str) -> None:
    nested = Once(how)
    model = nested.model = busy(on_step=nested)
    assert len(answer(model, outer))
    assert nested.said not in (None, "asked")
    assert model.invoke("hello").text  # the slot is free


def answer(model: ChatS2T, outer: str, **config: Any) -> str:
    async def drained() -> str:
        return "".join([str(chunk.content) async for chunk in model.astream("hello", config)])

    if outer == "stream":
        return "".join(str(chunk.content) for chunk in model.stream("hello", config))
    if outer == "astream":
        return asyncio.run(drained())
    if outer == "ainvoke":
        return str(asyncio.run(model.ainvoke("hello", config)).content)
    return str(model.invoke("hello", config).content)


@pytest.mark.parametrize("outer", ["invoke", "stream", "ainvoke", "astream"])
def test_a_call_from_a_tokens_callback_shares_the_slot(outer: str) -> None:
    class Handler(BaseCallbackHandler):
        raise_error = True

        def __init__(self) -> None:
            self.once = Once(lambda model: model.invoke("hello", {"callbacks": []}))

        def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
            self.once()

    handler = Handler()
    model = handler.once.model = busy(streaming=True)
    assert answer(model, outer, callbacks=[handler])
    assert handler.once.said not in (None, "asked")


@pytest.mark.parametrize("outer", ["ainvoke", "astream"])
def test_a_call_from_an_async_callback_shares_the_slot(outer: str) -> None:
    class Handler(AsyncCallbackHandler):
        raise_error = True
        said: Any = None

        async def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
            if self.said is None:
                self.said = "asked"
                self.said = await model.ainvoke("hello", {"callbacks": []})

    handler, model = Handler(), busy(streaming=True)
    assert answer(model, outer, callbacks=[handler])
    assert isinstance(handler.said, AIMessage)


def test_a_call_from_a_thread_that_a_judge_starts_shares_the_slot() -> None:
    said: list[Any] = []

    def on_step(trace: str, step: Any) -> None:
        if not said:
            thread = threading.Thread(target=with_current_scopes(lambda: said.append(model.invoke("hello"))))
            said.append("asked")
            thread.start()
            thread.join(40)

    model = busy(on_step=on_step)
    model.invoke("hello")
    assert isinstance(said[-1], AIMessage)


def test_who_consumes_a_stream_is_not_the_stream() -> None:
    model = busy(concurrency=Concurrency(running=1, waiting=0))
    stream = model.stream("hello")
    next(stream)
    with pytest.raises(Overloaded):
        model.invoke("hello")
    stream.close()  # type: ignore[attr-defined]
    assert model.invoke("hello")


def test_a_task_that_outlives_its_generation_waits_like_anybody() -> None:
    model = busy(concurrency=Concurrency(running=1, waiting=0))
    go = threading.Event()
    tasks: list[Any] = []

    async def main() -> Any:
        loop = asyncio.get_running_loop()

        async def later() -> Any:
            await asyncio.to_thread(go.wait, 30)
            return await model.ainvoke("hello")

        def on_step(trace: str, step: Any) -> None:
            if not tasks:
                tasks.append(asyncio.run_coroutine_threadsafe(later(), loop))

        await model.model_copy(update={"on_step": on_step}).ainvoke("hello")
        stream = model.astream("hello")
        await anext(stream)
        go.set()
        with pytest.raises(Overloaded):
            await asyncio.wrap_future(tasks[0])
        await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(main())


def test_calls_without_end_are_refused_by_name() -> None:
    def on_step(trace: str, step: Any) -> None:
        depth.append(1)
        model.invoke("hello")

    depth: list[int] = []
    model = busy(on_step=on_step)
    with pytest.raises(Overloaded, match="call"):
        model.invoke("hello")
    assert len(depth) == DEEPEST
    assert model.model_copy(update={"on_step": None}).invoke("hello").text  # the slot is free
