"""A deep agent (``pip install deepagents``) whose sub-agents run here, each on a budget of its own below one for all.

``python examples/deep_agents.py`` needs no key and no network: a script stands in for the planner, whose prompt of some
thousand tokens is more than the bundled pair can read. ``python examples/deep_agents.py MODEL`` plans with a model of
yours (a directory, GGUF file or hub id), on a budget too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from deepagents import CompiledSubAgent, create_deep_agent
from langchain.agents import create_agent
from langchain_core.language_models import BaseChatModel, GenericFakeChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.tools import tool
from s2t_agents.integrations.langgraph import BudgetMiddleware

from s2t_agents import Budget, ChatS2T, Ledger, LocalLLM
from s2t_agents.types import LimitWarning

STOCK = {"lamps": 7, "kites": 3}
PRICES = {"lamps": 25, "kites": 12}
TASKS = {"stock": "How many lamps are in stock?", "prices": "What is the price of lamps?"}


@tool
def get_stock(item: str) -> int:
    """Get the number of items in stock."""
    return STOCK.get(item, 0)


@tool
def get_price(item: str) -> int:
    """Get the price of an item."""
    return PRICES.get(item, 0)


class Script(GenericFakeChatModel):
    """Hands each sub-agent its task, then reports what they said."""

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Any:
        """The same: it knows what to call."""
        return self


def script() -> Script:
    """The planner's stand-in."""
    calls = [
        {"name": "task", "args": {"description": task, "subagent_type": name}, "id": f"call_{name}"}
        for name, task in TASKS.items()
    ]
    return Script(messages=iter([AIMessage("", tool_calls=calls), AIMessage("Both have answered.")]))


def team(budget: Budget, ledger: Ledger, planner: BaseChatModel | None = None) -> Any:
    """A deep agent with two sub-agents.

    Args:
        budget: of all together.
        ledger: who did what, by agent.
        planner: the deep agent's own model; None takes the script.
    """
    llm = ChatS2T(selector="s2t-demo", escalation=LocalLLM("s2t-demo-llm"), ledger=ledger, max_tokens=64)
    limits = {"stock": {"escalations": 3, "answer_tokens": 200}, "prices": {"escalations": 3, "answers": 4}}
    tools = {"stock": get_stock, "prices": get_price}
    subagents = [
        CompiledSubAgent(
            name=name,
            description=f"Knows the {name} of a shop.",
            runnable=create_agent(
                llm,
                [tools[name]],
                name=name,
                middleware=[BudgetMiddleware(budget, agent=name, per_agent=limits[name])],  # type: ignore[arg-type]
            ),
        )
        for name in TASKS
    ]
    planning = [BudgetMiddleware(budget, agent="planner")] if planner is not None else []
    return create_deep_agent(planner or script(), subagents=subagents, middleware=planning, name="planner")


def main(model: str | None = None) -> dict[str, Any]:
    """Ask the team; returns what came of it."""
    warned: list[LimitWarning] = []
    budget = Budget(escalations=5, answers=20, seconds=600, on_warning=warned.append, name="team")
    ledger = Ledger()
    planner = ChatS2T(model=model, budget=budget, ledger=ledger) if model is not None else None
    asked = "How many lamps are there, and at what price?"
    messages: list[BaseMessage] = team(budget, ledger, planner).invoke({"messages": asked})["messages"]
    for message in messages:
        print(f"{message.type:>5}  {message.text or [call['args'] for call in getattr(message, 'tool_calls', [])]}")
    for agent, sums in ledger.totals("agent").items():
        print(f"{agent}: {sums.generations} answers, {sums.escalations} questions to the LLM")
    print(f"budget: {budget.state().as_dict()['spent']}, warnings: {[each.unit for each in warned]}")
    return {"messages": messages, "budget": budget, "ledger": ledger}


if __name__ == "__main__":
    main(*sys.argv[1:2])
