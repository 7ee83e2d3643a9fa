"""A ledger as three agents on the bundled pair leave it, for the pictures of ``s2t report`` and ``s2t trace``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from langchain.agents import create_agent

from s2t_agents import Budget, ChatS2T, Ledger, LocalLLM
from s2t_agents.demo.agent import DEVICE_PRICE, LLM_PRICE
from s2t_agents.ledger import Recording

AGENTS = {"researcher": 20, "writer": 6, "clerk": 1}
"""Escalations that each agent may spend."""
QUESTIONS = (
    "Look up the stock of lamps. Then 27 are taken. Add 55 to it. What is the result?",
    "Look up the stock of chairs. Then 38 are taken. Add 49 to it. What is the result?",
    "Look up the stock of bowls. Then 16 are taken. Add 86 to it. What is the result?",
)


def get_stock(item: str) -> int:
    """Look up the stock of an item."""
    return 85


def write(path: Path) -> None:
    """Run the agents; the ledger's file has every step with its text."""
    torch.set_num_threads(1)
    ledger = Ledger.open(path, recording=Recording(steps=True, text=True))
    team = Budget(usd="0.01", name="team")
    model = ChatS2T(
        selector="s2t-demo",
        escalation=LocalLLM("s2t-demo-llm", price=LLM_PRICE),
        device_price=DEVICE_PRICE,
        ledger=ledger,
        max_tokens=64,
    )
    for name, escalations in AGENTS.items():
        settings = {"s2t_agent": name, "s2t_budget": team.child(name, escalations=escalations), "thread_id": name}
        agent: Any = create_agent(model, tools=[get_stock])
        for question in QUESTIONS:
            agent.invoke({"messages": question}, {"configurable": settings})
    ledger.close()
