"""Attribution: the ledger splits by agent in every way that LangChain and LangGraph call a model."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import SummarizationMiddleware, wrap_model_call
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph

from s2t_agents import ChatS2T, Ledger
from s2t_agents.chat.attribution import agent_of
from s2t_agents.testing import tiny_model

SAY = {"messages": [HumanMessage("hi")]}


def chat(**settings: Any) -> ChatS2T:
    """Answers of four tokens, unless a call is forced; a window that holds an agent's tools."""
    model = tiny_model(max_position_embeddings=4096)
    return ChatS2T(**{"model": model, "max_tokens": 4, "ledger": Ledger(), **settings})


def split(model: ChatS2T) -> dict[str, int]:
    """Generations per agent."""
    assert model.ledger is not None
    return {agent: totals.generations for agent, totals in sorted(model.ledger.totals("agent").items())}


def pair(model: ChatS2T) -> Any:
    """Two named agents that run in parallel."""
    graph = StateGraph(MessagesState)
    for node, name in (("left", "alpha"), ("right", "beta")):
        graph.add_node(node, create_agent(model, name=name))
        graph.add_edge(START, node)
    return graph.compile()


def by_invoke(graph: Any) -> None:
    graph.invoke(SAY)


def by_ainvoke(graph: Any) -> None:
    asyncio.run(graph.ainvoke(SAY))


def by_updates(graph: Any) -> None:
    list(graph.stream(SAY, stream_mode="updates"))


def by_messages(graph: Any) -> None:
    list(graph.stream(SAY, stream_mode="messages", subgraphs=True))


def by_messages_async(graph: Any) -> None:
    async def drain() -> None:
        async for _ in graph.astream(SAY, stream_mode="messages", subgraphs=True):
            pass

    asyncio.run(drain())


def by_events(graph: Any) -> None:
    async def drain() -> None:
        async for _ in graph.astream_events(SAY, version="v2"):
            pass

    asyncio.run(drain())


def by_batch(graph: Any) -> None:
    graph.batch([SAY])


MODES: list[Callable[[Any], None]] = [
    by_invoke,
    by_ainvoke,
    by_updates,
    by_messages,
    by_messages_async,
    by_events,
    by_batch,
]


@pytest.mark.parametrize("drive", MODES)
@pytest.mark.parametrize("streaming", [None, True])
def test_two_named_agents_at_once_are_told_apart_in_every_mode(drive: Callable[[Any], None], streaming: Any) -> None:
    model = chat() if streaming is None else chat(streaming=streaming)
    drive(pair(model))
    assert split(model) == {"alpha": 1, "beta": 1}


@pytest.mark.parametrize("drive", MODES)
def test_unnamed_agents_and_plain_nodes_go_by_their_place_in_the_graph(drive: Callable[[Any], None]) -> None:
    model = chat()
    team = StateGraph(MessagesState)
    team.add_node("writer", create_agent(model))
    team.add_node("critic", lambda state: {"messages": [model.invoke(state["messages"])]})
    graph = StateGraph(MessagesState)
    graph.add_node("team", team.add_edge(START, "writer").add_edge(START, "critic").compile())
    graph.add_node("editor", create_agent(model))
    drive(graph.add_edge(START, "team").add_edge(START, "editor").compile())
    assert split(model) == {"editor": 1, "team/critic": 1, "team/writer": 1}


@pytest.mark.parametrize("drive", MODES)
def test_an_agent_inside_a_tool_is_not_charged_to_its_caller(drive: Callable[[Any], None]) -> None:
    model = chat(max_tokens=64)
    helper = create_agent(model)

    @tool
    def ask() -> str:
        """Ask a helper."""
        return str(helper.invoke(SAY)["messages"][-1].text)[:4]

    @wrap_model_call
    def call_once(request: Any, handler: Any) -> Any:
        asked = any(message.type == "tool" for message in request.messages)
        return handler(request.override(tool_choice="none" if asked else "any"))

    @wrap_model_call
    async def acall_once(request: Any, handler: Any) -> Any:
        asked = any(message.type == "tool" for message in request.messages)
        return await handler(request.override(tool_choice="none" if asked else "any"))

    waits = drive in (by_ainvoke, by_messages_async, by_events)
    boss = create_agent(model, [ask], name="boss", middleware=[acall_once if waits else call_once])
    drive(boss)
    assert split(model) == {"boss": 2, "boss/tools": 1}


def test_calls_that_middleware_makes_are_its_agents() -> None:
    model = chat()
    summary = SummarizationMiddleware(model, trigger=("messages", 2), keep=("messages", 1))
    agent = create_agent(model, name="talker", middleware=[summary])
    agent.invoke({"messages": [HumanMessage("hi"), AIMessage("yo"), HumanMessage("ho")]})
    assert split(model) == {"talker": 2}


@pytest.mark.parametrize("drive", MODES)
def test_thread_and_run_are_recorded(drive: Callable[[Any], None]) -> None:
    model = chat()
    agent = create_agent(model, name="alpha", checkpointer=InMemorySaver())
    drive(agent.with_config(configurable={"thread_id": "t-1"}))
    assert model.ledger is not None
    [record] = model.ledger.records(agent="alpha", thread_id="t-1")
    assert record.run_id


@pytest.mark.parametrize("drive", [by_invoke, by_ainvoke])
def test_a_thread_is_recorded_outside_a_graph_too(drive: Callable[[Any], None]) -> None:
    model = chat()
    plain = RunnableLambda(lambda said: said["messages"]) | model
    drive(plain.with_config(configurable={"thread_id": "t-1"}))
    drive(plain.with_config(metadata={"thread_id": "t-2"}, configurable={"thread_id": "less near"}))
    drive(plain)
    assert model.ledger is not None
    assert sorted(model.ledger.totals("thread")) == ["(none)", "t-1", "t-2"]


@pytest.mark.parametrize(
    "ask",
    [
        lambda model, config: model.invoke("hi", config),
        lambda model, config: asyncio.run(model.ainvoke("hi", config)),
        lambda model, config: list(model.stream("hi", config)),
        lambda model, config: model.batch(["hi"], config),
        lambda model, config: model.with_config(config).invoke("hi"),
        lambda model, config: model.bind_tools([]).invoke("hi", config),
    ],
)
def test_the_thread_of_a_call_that_stands_alone_is_recorded(ask: Callable[[ChatS2T, Any], Any]) -> None:
    model = chat()
    ask(model, {"configurable": {"thread_id": "t-1"}})
    ask(model, {"metadata": {"thread_id": "t-2"}, "configurable": {"thread_id": "less near"}})
    assert model.ledger is not None
    assert [record.thread_id for record in model.ledger.records()] == ["t-1", "t-2"]


def test_an_explicit_name_wins_wherever_it_is_said() -> None:
    model = chat()
    model.invoke("hi", s2t_agent="call")
    model.bind(s2t_agent="bound").invoke("hi")
    model.invoke("hi", {"metadata": {"s2t_agent": "metadata"}})
    model.with_config(metadata={"s2t_agent": "own"}).invoke("hi")
    node = RunnableLambda(lambda text: model.invoke(text))
    node.invoke("hi", {"configurable": {"s2t_agent": "configurable"}})
    create_agent(model, name="named").invoke(SAY, {"metadata": {"s2t_agent": "over a name"}})
    model.invoke("hi")
    names = ("bound", "call", "configurable", "default", "metadata", "over a name", "own")
    assert split(model) == dict.fromkeys(names, 1)


def test_a_callers_name_does_not_stick_to_the_next_call() -> None:
    model = chat()
    create_agent(model, name="alpha").invoke(SAY)
    model.invoke("hi")
    list(model.stream("hi"))
    assert split(model) == {"alpha": 1, "default": 2}


async def test_tasks_in_one_loop_keep_their_names() -> None:
    model = chat()
    agents = [create_agent(model, name=f"agent {i}") for i in range(6)]
    await asyncio.gather(*(agent.ainvoke(SAY) for agent in agents))
    assert split(model) == {f"agent {i}": 1 for i in range(6)}


@pytest.mark.parametrize(
    ("metadata", "name"),
    [
        ({}, "default"),
        ({"langgraph_node": "writer"}, "writer"),
        ({"langgraph_node": "model", "langgraph_checkpoint_ns": "model:1"}, "model"),
        ({"lc_agent_name": "a", "langgraph_checkpoint_ns": "x:1|model:2"}, "a"),
        ({"lc_agent_name": "a", "langgraph_checkpoint_ns": "tools:1"}, "a"),
        ({"lc_agent_name": "a", "langgraph_checkpoint_ns": "x:1|tools:2|y:3|model:4"}, "a/tools/y"),
        ({"s2t_agent": "b", "lc_agent_name": "a"}, "b"),
    ],
)
def test_names_in_metadata(metadata: dict[str, Any], name: str) -> None:
    assert agent_of(metadata) == name
