"""A process that spends from a shared budget, run by tests as ``python budget_worker.py spend|hold STORE LOG``."""

from __future__ import annotations

import os
import random
import sys
import time

from budget_support import ONE, open_store

from s2t_agents.budget import Budget
from s2t_agents.errors import BudgetExceeded


def spend(budget: Budget) -> None:
    """Take one unit at a time until nothing is left; print how many."""
    mine = 0
    while True:
        try:
            with budget.reserve(ONE) as hold:
                if random.random() < 0.3:
                    hold.release()
                else:
                    hold.settle(ONE)
                    mine += 1
        except BudgetExceeded:
            state = budget.state()
            if state.left["escalations"] == 0 and state.holds == 0:
                print(mine, flush=True)
                return
            time.sleep(0.001)


def hold_until_killed(budget: Budget, log: str) -> None:
    """Reserve and settle until the process is killed, noting every settled unit."""
    notes = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    while True:
        hold = budget.reserve(ONE, ttl_s=1.5)
        hold.settle(ONE)
        os.write(notes, b"x")
        budget.reserve(ONE, ttl_s=1.5)  # never settled: it has to lapse


if __name__ == "__main__":
    role, spec, log = sys.argv[1:]
    random.seed(os.getpid())
    shared = Budget(store=open_store(spec), escalations=100 if role == "spend" else 1_000_000)
    print("ready", flush=True)
    sys.stdin.readline()
    if role == "spend":
        spend(shared)
    else:
        hold_until_killed(shared, log)
