"""LangChain agents: tools, structured answers, middleware, several agents at once; sync and async."""

import asyncio
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import (
    AgentMiddleware,
    ModelCallLimitMiddleware,
    ModelFallbackMiddleware,
    SummarizationMiddleware,
)
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import Send
from pydantic import BaseModel, Field

from s2t_agents import Budget, ChatS2T, Ledger
from s2t_agents.escalation import Escalation
from s2t_agents.testing import ScriptedLLM, last_candidate, tiny_model
from s2t_agents.triggers import always

ASK = {"messages": [HumanMessage("What is 3 + 4?")]}
EXAMPLE = Path(__file__).parent.parent / "examples" / "agents.py"


class Sum(BaseModel):
    """The result."""

    value: int = Field(ge=0, le=99)


@tool
def add(a: int, b: int) -> str:
    """Add two numbers."""
    return f"{a} + {b} = {a + b}"


class CallFirst(AgentMiddleware):
    """Forces a call in the first turn and forbids it afterwards: a random model would never decide."""

    def wrap_model_call(self, request: Any, handler: Any) -> Any:
        return handler(self._decided(request))

    async def awrap_model_call(self, request: Any, handler: Any) -> Any:
        return await handler(self._decided(request))

    def _decided(self, request: Any) -> Any:
        asked = any(isinstance(message, ToolMessage) for message in request.messages)
        return request.override(model_settings={"tool_choice": "none"} if asked else {"tool_choice": "add"})


class Decided(CallFirst):
    """The same where ``create_agent`` passes no tool choice of its own."""

    def _decided(self, request: Any) -> Any:
        asked = any(isinstance(message, ToolMessage) for message in request.messages)
        return request.override(tool_choice="none" if asked else "any")


def chat(**settings: Any) -> ChatS2T:
    model = tiny_model(max_position_embeddings=4096, seed=8)
    return ChatS2T(**{"model": model, "max_tokens": 64, "ledger": Ledger(), **settings})


def sync(agent: Any, given: Any, **config: Any) -> Any:
    return agent.invoke(given, config)


def in_a_loop(agent: Any, given: Any, **config: Any) -> Any:
    return asyncio.run(agent.ainvoke(given, config))


BOTH_WAYS = pytest.mark.parametrize("run", [sync, in_a_loop], ids=["sync", "async"])
Run = Callable[..., Any]


@BOTH_WAYS
def test_an_agent_calls_its_tool_reads_the_result_and_answers(run: Run) -> None:
    model = chat()
    out = run(create_agent(model, [add], name="a", middleware=[Decided()]), ASK)
    _, call, result, answer = out["messages"]
    arguments = call.tool_calls[0]["args"]
    assert result.content == f"{arguments['a']} + {arguments['b']} = {sum(arguments.values())}"
    assert answer.text
    assert not answer.tool_calls
    first, second = model.ledger.records()
    assert second.prompt_tokens > first.prompt_tokens + first.completion_tokens


@BOTH_WAYS
@pytest.mark.parametrize(
    "response_format", [Sum, ProviderStrategy(Sum), ToolStrategy(Sum)], ids=["auto", "json", "call"]
)
def test_a_structured_answer_takes_one_call(run: Run, response_format: Any) -> None:
    model = chat()
    out = run(create_agent(model, response_format=response_format), ASK)
    assert isinstance(out["structured_response"], Sum)
    assert model.ledger.total().generations == 1


def test_the_profile_makes_create_agent_choose_the_provider_strategy() -> None:
    out = create_agent(chat(), response_format=Sum).invoke(ASK)
    assert Sum.model_validate_json(out["messages"][-1].text) == out["structured_response"]


@BOTH_WAYS
def test_tools_and_a_structured_answer_go_together(run: Run) -> None:
    out = run(
        create_agent(chat(max_tokens=96), [add], response_format=ProviderStrategy(Sum), middleware=[CallFirst()]), ASK
    )
    assert [message.type for message in out["messages"]] == ["human", "ai", "tool", "ai"]
    assert isinstance(out["structured_response"], Sum)


@BOTH_WAYS
def test_a_long_history_is_summarized_within_the_models_window(run: Run) -> None:
    model = chat(max_tokens=8)
    summary = SummarizationMiddleware(
        model, trigger=("fraction", 0.2), keep=("messages", 2), token_counter=count(model)
    )
    agent = create_agent(model, name="talker", middleware=[summary])
    history = [kind("so it went on " * 10) for _ in range(4) for kind in (HumanMessage, AIMessage)]
    out = run(agent, {"messages": [*history, HumanMessage("and?")]})
    assert len(out["messages"]) < len(history)
    assert model.ledger.totals("agent")["talker"].generations == 2


def count(model: ChatS2T) -> Callable[..., int]:
    return lambda messages, **_: model.get_num_tokens_from_messages(list(messages))


@BOTH_WAYS
def test_a_call_limit_ends_the_run(run: Run) -> None:
    model = chat()

    class Always(CallFirst):
        def _decided(self, request: Any) -> Any:
            return request.override(tool_choice="any")

    limit = ModelCallLimitMiddleware(run_limit=2, exit_behavior="end")
    out = run(create_agent(model, [add], middleware=[limit, Always()]), ASK)
    assert "limit" in out["messages"][-1].text
    assert model.ledger.total().generations == 2


@BOTH_WAYS
def test_a_fallback_model_takes_over_when_the_first_fails(run: Run) -> None:
    good = chat(max_tokens=8)
    broken = ChatS2T(model="/no/such/model", ledger=good.ledger)
    out = run(create_agent(broken, name="a", middleware=[ModelFallbackMiddleware(good)]), ASK)
    assert out["messages"][-1].response_metadata["model_name"] == "tiny-qwen3-8"
    assert good.ledger.totals("agent")["a"].generations == 1


@BOTH_WAYS
def test_many_agents_in_parallel_share_one_budget_without_overrun(run: Run) -> None:
    llm = Escalation(ScriptedLLM(last_candidate), margin=1.0)
    model = chat(max_tokens=8, trigger=always(), escalation=llm, budget=Budget(escalations=20))
    graph = StateGraph(MessagesState)
    for i in range(4):
        graph.add_node(f"node {i}", create_agent(model, name=f"agent {i}"))
        graph.add_edge(START, f"node {i}")
    run(graph.compile(), ASK)
    totals = model.ledger.totals("agent")
    assert set(totals) == {f"agent {i}" for i in range(4)}
    assert sum(one.escalations for one in totals.values()) == 20 == model.budget.state().spent["escalations"]
    assert sum(one.refused for one in totals.values()) == 4 * 8 - 20


@BOTH_WAYS
def test_work_that_fans_out_keeps_its_name(run: Run) -> None:
    model = chat(max_tokens=4)
    graph = StateGraph(MessagesState)
    graph.add_node("mapper", create_agent(model, name="mapper"))
    graph.add_conditional_edges(START, lambda state: [Send("mapper", ASK) for _ in range(3)], ["mapper"])
    run(graph.compile(), ASK)
    assert {agent: one.generations for agent, one in model.ledger.totals("agent").items()} == {"mapper": 3}


def test_a_thread_resumes_with_its_history() -> None:
    model = chat(max_tokens=8)
    agent = create_agent(model, checkpointer=InMemorySaver())
    config = {"configurable": {"thread_id": "t"}}
    agent.invoke(ASK, config)
    out = agent.invoke({"messages": [HumanMessage("more")]}, config)
    assert [message.type for message in out["messages"]] == ["human", "ai", "human", "ai"]
    assert len(model.ledger.records(thread_id="t")) == 2


def test_a_program_written_for_chat_openai_runs_with_one_line_changed(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("agents_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    out = example.main()
    answers = [message for message in out["messages"] if isinstance(message, AIMessage)]
    assert {message.name: message.text for message in answers} == {
        "stock": "The result is 7.",
        "prices": "The result is 25.",
    }
    results = [message for message in out["messages"] if isinstance(message, ToolMessage)]
    assert {message.name for message in results} == {"get_stock", "get_price"}
    assert out["order"] == example.Order(item="lamps", count=5)
    assert len(out["streamed"]) > 2
    assert "".join(out["streamed"]) in capsys.readouterr().out


def test_the_example_differs_from_its_original_in_one_line() -> None:
    text = EXAMPLE.read_text(encoding="utf-8").splitlines()
    original = [line.strip() for line in text if "ChatOpenAI(" in line and line.strip().startswith("#")]
    ours = [line.strip() for line in text if "ChatS2T(" in line]
    assert len(original) == len(ours) == 1
    shared = original[0].split("temperature")[1]
    assert ours[0].endswith("temperature" + shared)


def test_a_deep_agents_sub_agents_are_each_on_a_budget_below_one_for_all(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("deepagents", reason="pip install deepagents")
    spec = importlib.util.spec_from_file_location("deep_agents", EXAMPLE.parent / "deep_agents.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.main()
    said = [message.text for message in found["messages"] if isinstance(message, ToolMessage)]
    assert ["7" in said[0], "25" in said[1]] == [True, True]
    budget, totals = found["budget"], found["ledger"].totals("agent")
    assert set(totals) == {"stock", "prices"}
    assert budget.state().spent["answers"] == sum(sums.generations for sums in totals.values()) == 4
    assert budget.child("prices").state().limit == {"escalations": 3, "answers": 4}
    assert budget.child("stock").state().spent["answers"] == 2
    assert "budget:" in capsys.readouterr().out
