"""What a call may say besides its messages: where it may be said, and what is refused."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import BaseMessage
from langchain_core.runnables import RunnableLambda

from s2t_agents import Budget, ChatS2T, Ledger
from s2t_agents.escalation import Escalation
from s2t_agents.testing import ScriptedLLM, last_candidate, tiny_model
from s2t_agents.triggers import always


def chat(**settings: Any) -> ChatS2T:
    """Escalates at each of its four tokens, as far as the budget goes."""
    llm = Escalation(ScriptedLLM(last_candidate), margin=1.0)
    model = tiny_model(max_position_embeddings=4096)
    return ChatS2T(**{"model": model, "max_tokens": 4, "trigger": always(), "escalation": llm, **settings})


def by_invoke(model: Any, config: Any, **call: Any) -> BaseMessage:
    return model.invoke("hello", config, **call)


def by_ainvoke(model: Any, config: Any, **call: Any) -> BaseMessage:
    return asyncio.run(model.ainvoke("hello", config, **call))


def by_stream(model: Any, config: Any, **call: Any) -> BaseMessage:
    first, *rest = model.stream("hello", config, **call)
    return sum(rest, first)


def by_astream(model: Any, config: Any, **call: Any) -> BaseMessage:
    async def drain() -> BaseMessage:
        first, *rest = [chunk async for chunk in model.astream("hello", config, **call)]
        return sum(rest, first)

    return asyncio.run(drain())


def by_batch(model: Any, config: Any, **call: Any) -> BaseMessage:
    return model.batch(["hello"], config, **call)[0]


def by_abatch(model: Any, config: Any, **call: Any) -> BaseMessage:
    return asyncio.run(model.abatch(["hello"], config, **call))[0]


def by_events(model: Any, config: Any, **call: Any) -> BaseMessage:
    async def drain() -> BaseMessage:
        events = [event async for event in model.astream_events("hello", config, version="v2", **call)]
        return events[-1]["data"]["output"]

    return asyncio.run(drain())


def by_events_v3(model: Any, config: Any, **call: Any) -> BaseMessage:
    return model.stream_events("hello", config, version="v3", **call).output


def by_aevents_v3(model: Any, config: Any, **call: Any) -> BaseMessage:
    async def drain() -> BaseMessage:
        stream = await model.astream_events("hello", config, version="v3", **call)
        return await stream.output

    return asyncio.run(drain())


WAYS: list[Callable[..., BaseMessage]] = [
    by_invoke,
    by_ainvoke,
    by_stream,
    by_astream,
    by_batch,
    by_abatch,
    by_events,
    by_events_v3,
    by_aevents_v3,
]


# ---------------------------------------------------------------------- from the config


@pytest.mark.filterwarnings("ignore:.*is in beta")
@pytest.mark.parametrize("call", WAYS)
def test_a_config_handed_to_the_model_carries_budget_and_agent(call: Callable[..., BaseMessage]) -> None:
    model, own = chat(ledger=Ledger()), Budget(escalations=1)
    answer = call(model, {"configurable": {"s2t_budget": own, "s2t_agent": "critic"}})
    assert answer.response_metadata["s2t"]["escalations"] == own.state().spent["escalations"] == 1
    assert list(model.ledger.totals("agent")) == ["critic"]


@pytest.mark.parametrize("wrap", ["with_config", "bind", "bind_tools", "sequence"])
def test_it_does_so_through_what_langchain_makes_of_the_model(wrap: str) -> None:
    model, own = chat(), Budget(escalations=1)
    config = {"configurable": {"s2t_budget": own}}
    chains = {
        "with_config": lambda: model.with_config(config).invoke("hello"),
        "bind": lambda: model.bind(stop=["zzz"]).invoke("hello", config),
        "bind_tools": lambda: model.bind_tools([]).invoke("hello", config),
        "sequence": lambda: (RunnableLambda(lambda text: text) | model).invoke("hello", config),
    }
    chains[wrap]()
    assert own.state().spent["escalations"] == 1


def test_the_call_goes_before_the_config_and_the_config_before_the_node_around_it() -> None:
    model, node, config, call = chat(), *(Budget(escalations=1, name=name) for name in ("node", "config", "call"))
    given = {"configurable": {"s2t_budget": config}}
    spent = lambda: [budget.state().spent["escalations"] for budget in (node, config, call)]  # noqa: E731

    def inside(how: Callable[[], object]) -> list[object]:
        RunnableLambda(lambda _: how()).invoke("", {"configurable": {"s2t_budget": node}})
        return spent()

    assert inside(lambda: model.invoke("hello", given, s2t_budget=call)) == [0, 0, 1]
    assert inside(lambda: model.invoke("hello", given)) == [0, 1, 1]
    assert inside(lambda: model.invoke("hello", {"configurable": {"thread_id": "t"}})) == [1, 1, 1]


def test_a_configs_cache_scope_keeps_tenants_apart() -> None:
    model, text = chat(escalation=None), "hello " * 40
    reused = [
        model.invoke(text, {"configurable": {"s2t_cache_scope": scope}}).response_metadata["s2t"]["reused_tokens"]
        for scope in ("one", "two", "one")
    ]
    assert reused[:2] == [0, 0]
    assert reused[2] > 0


@pytest.mark.parametrize("call", [by_invoke, by_stream])
@pytest.mark.parametrize("said", ["config", "call"])
def test_tracers_and_caches_get_no_budget(call: Callable[..., BaseMessage], said: str) -> None:
    class Tracer(BaseCallbackHandler):
        def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
            seen.append(repr((args, kwargs)))

    seen: list[str] = []
    model, own = chat(callbacks=[Tracer()]), Budget(escalations=1)
    if said == "call":
        call(model, None, s2t_budget=own)
    else:
        call(model, {"configurable": {"s2t_budget": own}})
    assert len(seen) == 1
    assert "Budget" not in seen[0]
