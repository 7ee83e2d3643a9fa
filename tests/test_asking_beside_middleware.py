"""Budgets that interrupt for more, beside other middleware: the run is that of an agent that never has to ask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import (
    AgentMiddleware,
    HumanInTheLoopMiddleware,
    ModelCallLimitMiddleware,
    ToolCallLimitMiddleware,
    after_model,
)
from langchain_core.messages import AIMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command
from s2t_agents.integrations.langgraph import BudgetMiddleware

from s2t_agents import Budget, ChatS2T, Escalation, TokenPrice
from s2t_agents.testing import ScriptedLLM
from s2t_agents.triggers import when

QUESTION = "Look up the stock of lamps. Then 28 are taken. Add 37 to it. What is the result?"
START, GRANT = 3, 4
PRICE = TokenPrice(Decimal(1), Decimal(1))
THREAD: Any = {"configurable": {"thread_id": "1"}}
MOST = 40
"""Interrupts of one run; more means that it never ends."""

REVIEWS = {
    "approve": {"type": "approve"},
    "reject": {"type": "reject", "message": "Never do that."},
    "edit": {"type": "edit", "edited_action": {"name": "get_stock", "args": {"item": "pens"}}},
}


@dataclass
class Run:
    """What came of an agent's run, and who was asked on the way."""

    limit: int
    decision: Any = None
    reviews: list[Any] = field(default_factory=list)
    questions: int = 0
    looked_up: list[str] = field(default_factory=list)
    seen: list[Any] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.llm = ScriptedLLM(lambda ids, c: [-0.1 * i for i in range(1, len(c) + 1)], price=PRICE)
        self.budget = Budget(escalations=self.limit, on_exhausted="ask")

    def agent(self, others: list[Any], budget_first: bool) -> Any:
        @tool
        def get_stock(item: str) -> int:
            """Look up the stock of an item."""
            self.looked_up.append(item)
            return 85

        escalation = Escalation(self.llm, margin=1.0)
        model = ChatS2T(selector="s2t-demo", escalation=escalation, trigger=when(lambda proposal: True), max_tokens=64)
        mine = BudgetMiddleware(self.budget)
        middleware = [mine, *others] if budget_first else [*others, mine]
        return create_agent(model, [get_stock], middleware=middleware, checkpointer=InMemorySaver())

    async def go(self, agent: Any, is_async: bool, given: Any = QUESTION) -> Run:
        step: Any = {"messages": given}
        for _ in range(MOST):
            values = (await agent.ainvoke(step, THREAD)) if is_async else agent.invoke(step, THREAD)
            if "__interrupt__" not in values:
                self.values = agent.get_state(THREAD).values
                return self
            [interrupt] = values["__interrupt__"]
            if interrupt.value.get("type") == "s2t_budget":
                self.questions += 1
                step = Command(resume={"escalations": GRANT})
            else:
                self.reviews.append(interrupt.value["action_requests"])
                step = Command(resume={"decisions": [self.decision]})
        raise AssertionError("it never ends")

    def said(self) -> list[Any]:
        """The messages, without the ids that every run makes anew."""
        return [
            (m.type, m.text, [call["args"] for call in getattr(m, "tool_calls", [])]) for m in self.values["messages"]
        ]

    def counts(self) -> dict[str, Any]:
        return {name: value for name, value in self.values.items() if "_call_count" in name}

    def answers_seen(self) -> list[Any]:
        """What a hook saw of the model, but for the empty messages in the place of refused tries."""
        assert all(isinstance(message, AIMessage) for message in self.seen), self.seen
        shown = [(message.text, [call["args"] for call in message.tool_calls]) for message in self.seen]
        return [answer for answer in shown if answer != ("", [])]


def reviewed(run: Run) -> list[Any]:
    return [HumanInTheLoopMiddleware(interrupt_on={"get_stock": True})]


def limited(run: Run) -> list[Any]:
    return [ToolCallLimitMiddleware(run_limit=1), ToolCallLimitMiddleware(tool_name="get_stock", thread_limit=2)]


def watched(run: Run) -> list[Any]:
    @after_model
    def watch(state: Any, runtime: Any) -> None:
        run.seen.append(state["messages"][-1])

    return [watch]


class Wrap(AgentMiddleware[Any, Any, Any]):
    """Looks at what each call of the model came to."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def wrap_model_call(self, request: Any, handler: Any) -> Any:
        response = handler(request)
        self.run.seen.append(response.result[-1])
        return response

    async def awrap_model_call(self, request: Any, handler: Any) -> Any:
        response = await handler(request)
        self.run.seen.append(response.result[-1])
        return response


def wrapped(run: Run) -> list[Any]:
    return [Wrap(run)]


BESIDE = [
    *(pytest.param(reviewed, decision, id=name) for name, decision in REVIEWS.items()),
    pytest.param(limited, None, id="tool call limits"),
    pytest.param(watched, None, id="after_model"),
    pytest.param(wrapped, None, id="wrap_model_call"),
]


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("budget_first", [False, True], ids=["budget last", "budget first"])
@pytest.mark.parametrize(("beside", "decision"), BESIDE)
async def test_a_run_that_has_to_ask_is_that_of_one_that_need_not(
    beside: Callable[[Run], list[Any]], decision: Any, budget_first: bool, is_async: bool
) -> None:
    free, asked = Run(10_000, decision), Run(START, decision)
    for run in (free, asked):
        await run.go(run.agent(beside(run), budget_first), is_async)
    assert asked.said() == free.said()
    assert asked.reviews == free.reviews  # a call that ran is not shown again
    assert asked.looked_up == free.looked_up
    assert asked.counts() == free.counts()
    assert asked.answers_seen() == free.answers_seen()
    paid = len(free.llm.asked)
    assert len(asked.llm.asked) == asked.budget.state().spent["escalations"] == paid
    assert asked.questions == -((START - paid) // GRANT) > 1
    assert free.questions == 0
    assert asked.values["s2t_cost_usd"]["llm"] == free.values["s2t_cost_usd"]["llm"]


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("budget_first", [False, True], ids=["budget last", "budget first"])
async def test_model_call_limits_count_answers_and_tries_where_they_stand_behind(
    budget_first: bool, is_async: bool
) -> None:
    run = Run(START)
    await run.go(run.agent([ModelCallLimitMiddleware(thread_limit=MOST)], budget_first), is_async)
    assert run.counts() == {"thread_model_call_count": 2 + (run.questions if budget_first else 0)}


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("target", ["model", "end"])
async def test_a_hook_that_jumps_away_from_an_empty_message_neither_loops_nor_leaves_it(
    target: Any, is_async: bool
) -> None:
    @after_model(can_jump_to=[target])
    def fill(state: Any, runtime: Any) -> Any:
        last = state["messages"][-1]
        return None if last.text or last.tool_calls else {"jump_to": target}

    free, asked = Run(10_000), Run(START)
    await free.go(free.agent([], True), is_async)
    agent = asked.agent([fill], True)
    await asked.go(agent, is_async)
    if target == "model":
        assert asked.said() == free.said()
        assert asked.questions > 1
        assert len(asked.llm.asked) == len(free.llm.asked)
    else:  # the hook's will: the run ends there, and the next one begins without it
        asked.budget.extend(escalations=10_000)
        await asked.go(agent, is_async)
        assert asked.questions == 0
        assert asked.said() == [free.said()[0], *free.said()]
