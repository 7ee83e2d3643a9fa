"""An ordinary LangChain program, written for ChatOpenAI, on a model that runs here: only the model's line changed.

Two agents with tools work side by side, a form is filled from free text, and an answer streams. Run it with
``python examples/agents.py``; it needs no key and no network.
"""

from __future__ import annotations

from typing import Any

from langchain.agents import create_agent
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import Send
from pydantic import BaseModel, Field

# from langchain_openai import ChatOpenAI
from s2t_agents import ChatS2T

STOCK = {"lamps": 7, "kites": 3}
PRICES = {"lamps": 25, "kites": 12}
QUESTIONS = {"stock": "How many lamps are in stock?", "prices": "What is the price of lamps?"}


@tool
def get_stock(item: str) -> int:
    """Get the number of items in stock."""
    return STOCK.get(item, 0)


@tool
def get_price(item: str) -> int:
    """Get the price of an item."""
    return PRICES.get(item, 0)


class Order(BaseModel):
    """Order an item."""

    item: str = Field(description="what to buy", max_length=20)
    count: int = Field(ge=1, le=999)


def team(llm: BaseChatModel) -> Any:
    """Two agents that work concurrently, each with its own tool and its own question."""
    graph = StateGraph(MessagesState)
    graph.add_node("stock", create_agent(llm, tools=[get_stock], name="stock"))
    graph.add_node("prices", create_agent(llm, tools=[get_price], name="prices"))
    return graph.add_conditional_edges(START, questions, ["stock", "prices"]).compile()


def questions(_: MessagesState) -> list[Send]:
    """To each agent its question."""
    return [Send(name, {"messages": [HumanMessage(asked)]}) for name, asked in QUESTIONS.items()]


def main() -> dict[str, Any]:
    """Ask the team, fill the form, stream a greeting; returns what came of it."""
    # llm = ChatOpenAI(model="gpt-4o-mini", temperature=0, max_tokens=128, timeout=30, max_retries=2)
    llm = ChatS2T(model="s2t-demo", temperature=0, max_tokens=128, timeout=30, max_retries=2)

    team_run = team(llm).invoke({"messages": []}, {"recursion_limit": 12})
    for message in team_run["messages"]:
        message.pretty_print()

    order = llm.with_structured_output(Order).invoke("Please get 5 lamps.")
    print(order)

    streamed = []
    for chunk in llm.stream("Good morning"):
        print(chunk.text, end="", flush=True)
        streamed.append(chunk.text)
    print()
    return {"messages": team_run["messages"], "order": order, "streamed": streamed}


if __name__ == "__main__":
    main()
