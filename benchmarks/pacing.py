"""What pacing a budget is worth on recorded receipts, beside spending it first come, first served, and hindsight."""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from langchain_core.messages import convert_to_messages
from rich.table import Table

from benchmarks.pacing_simulation import simulate
from s2t_agents.budget import Budget
from s2t_agents.bundled import LLM, SLM
from s2t_agents.chat.chat_model import ChatS2T
from s2t_agents.demo.world import generate
from s2t_agents.errors import ConfigError
from s2t_agents.escalation import Escalation, margins_of
from s2t_agents.ledger import GenerationRecord, Ledger
from s2t_agents.llms import LocalLLM
from s2t_agents.triggers import entropy

SHARES = (0.05, 0.1, 0.2, 0.4)
"""Of the selections, how many the budget pays for."""

GAINS = ("uncertainty", "changed")
"""What an escalation is worth: 1 - margin, or 1 where the LLM's pick is not the local one."""


def run(n: int = 200, seed: int = 0, *, nats: float = 0.02, orders: int = 50) -> dict[str, Any]:
    """Ask the LLM at every selection of the bundled pair, and spend smaller budgets on the receipts afterwards.

    Args:
        n: held-out word problems.
        seed: of the first one, and of the orders.
        nats: entropy from which a step is a selection; low, so that sure and unsure ones are among them.
        orders: random orders of the selections over which the means are taken.

    Returns:
        Per budget and per gain (``GAINS``): the share of the gain of the best choice with hindsight that spending in
        order reaches (``first_come``), and that pacing reaches (``paced``).

    Raises:
        ConfigError: no problems, or no orders.
    """
    if n < 1 or orders < 1:
        raise ConfigError(f"n is {n} and orders {orders}; at least 1 of each is needed.")
    records = _records(n, seed, nats)
    receipts, margins = [receipt for record in records for receipt in record.receipts], margins_of(records)
    gains = {
        "uncertainty": [1 - margin for margin in margins],
        "changed": [float(receipt.pick != receipt.local_pick()) for receipt in receipts],
    }
    return {
        "bench": "pacing",
        "problems": n,
        "seed": seed,
        "nats": nats,
        "orders": orders,
        "selections": len(receipts),
        "changed": int(sum(gains["changed"])),
        "shares": [
            {"budget": share, **{name: shares(margins, gains[name], share, orders, seed) for name in GAINS}}
            for share in SHARES
        ],
    }


def _records(n: int, seed: int, nats: float) -> list[GenerationRecord]:
    """Of answers in which every selection was escalated."""
    threads, ledger = torch.get_num_threads(), Ledger()
    torch.set_num_threads(1)
    try:
        everything = Escalation(LocalLLM(LLM), margin=1.0)
        model = ChatS2T(
            model=SLM, selector=SLM, escalation=everything, trigger=entropy(above=nats), budget=Budget(), ledger=ledger
        )
        for number in range(seed, seed + n):
            model.invoke(convert_to_messages(list(generate(number, "heldout", "word").prompt)))
    finally:
        torch.set_num_threads(threads)
    return list(ledger.records())


def shares(
    margins: Sequence[float], gains: Sequence[float], share: float, orders: int, seed: int
) -> dict[str, float | None]:
    """Means over random orders; None where there is nothing to gain."""
    if not any(gains):
        return {"first_come": None, "paced": None}
    runs = []
    for order in range(orders):
        places = random.Random(f"{seed}/{order}").sample(range(len(margins)), len(margins))
        shuffled, worth = ([values[place] for place in places] for values in (margins, gains))
        runs.append(simulate(shuffled, round(share * len(margins)), gains=worth))
    return {
        "first_come": round(fmean(each.share_first_come for each in runs), 3),
        "paced": round(fmean(each.share_paced for each in runs), 3),
    }


def table(result: dict[str, Any]) -> Table:
    """The result for people."""
    shown = Table(
        title=f"share of the gain with hindsight, {result['selections']} selections, {result['orders']} orders",
        title_justify="left",
    )
    for column in ("budget", *(f"{gain}: {how}" for gain in GAINS for how in ("first come", "paced"))):
        shown.add_column(column, justify="right")
    for row in result["shares"]:
        cells = [row[gain][how] for gain in GAINS for how in ("first_come", "paced")]
        shown.add_row(f"{row['budget']:.0%}", *("-" if cell is None else f"{cell:.2f}" for cell in cells))
    return shown
