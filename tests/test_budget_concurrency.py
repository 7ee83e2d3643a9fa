"""Exactly the limit is spent, by threads, tasks, processes and killed processes."""

# ruff: noqa: F811  (fixtures are imported by name)

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from budget_support import ONE, Place, place, redis_server, shared_place  # noqa: F401

from s2t_agents.budget import Budget, MemoryStore
from s2t_agents.errors import BudgetExceeded, StoreUnavailable

UNITS = 100


def test_64_threads_spend_exactly_100(place: Place) -> None:
    run = place.budget(escalations=UNITS)
    spent: list[int] = []
    overheld: list[object] = []
    start = threading.Barrier(64)

    def work(number: int) -> None:
        dice = random.Random(number)
        agent = run.child(f"agent-{number % 8}")
        start.wait()
        while True:
            try:
                with agent.reserve(ONE) as hold:
                    if dice.random() < 0.3:
                        continue  # the call failed: the block releases the hold
                    hold.settle(ONE)
                    spent.append(1)
            except BudgetExceeded as refused:
                if refused.spent + refused.held > UNITS:
                    overheld.append((refused.spent, refused.held))
                if refused.spent == UNITS:
                    return
                time.sleep(0.0005)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(spent) == UNITS
    assert not overheld
    state = run.state()
    assert (state.spent["escalations"], state.held["escalations"], state.holds) == (UNITS, 0, 0)
    agents = [run.child(f"agent-{number}").state().spent["escalations"] for number in range(8)]
    assert sum(agents) == UNITS


async def test_1000_tasks_spend_exactly_100(place: Place) -> None:
    budget = place.budget(escalations=UNITS)

    async def work() -> bool:
        try:
            with budget.reserve(ONE) as hold:
                await asyncio.sleep(0)
                hold.settle(ONE)
                return True
        except BudgetExceeded:
            return False

    granted = await asyncio.gather(*(work() for _ in range(1000)))
    assert sum(granted) == UNITS
    assert budget.state().spent["escalations"] == UNITS
    assert budget.state().holds == 0


async def test_cancelled_tasks_leave_nothing_held(place: Place) -> None:
    budget = place.budget(escalations=UNITS)
    dice = random.Random(7)
    settled = 0

    async def work() -> None:
        nonlocal settled
        with budget.reserve(ONE) as hold:
            await asyncio.sleep(dice.random() * 0.02)
            hold.settle(ONE)
            settled += 1
            await asyncio.sleep(dice.random() * 0.02)

    tasks = [asyncio.create_task(work()) for _ in range(UNITS)]
    for task in tasks:
        await asyncio.sleep(0.0003)
        if dice.random() < 0.5:
            task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert any(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
    assert budget.state().spent["escalations"] == settled
    assert budget.state().holds == 0


def _workers(count: int, role: str, spec: str, log: Path) -> list[subprocess.Popen[str]]:
    script = Path(__file__).with_name("budget_worker.py")
    made = [
        subprocess.Popen(
            [sys.executable, str(script), role, spec, str(log)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(count)
    ]
    for worker in made:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in made:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    return made


@pytest.mark.slow
def test_8_processes_spend_exactly_100(shared_place: Place, tmp_path: Path) -> None:
    budget = shared_place.budget(escalations=UNITS)
    workers = _workers(8, "spend", shared_place.spec, tmp_path / "log")
    each = [int(worker.communicate(timeout=120)[0]) for worker in workers]
    assert sum(each) == UNITS
    state = budget.state()
    assert (state.spent["escalations"], state.holds) == (UNITS, 0)


@pytest.mark.slow
def test_killed_holders_lose_nothing_and_leak_nothing(shared_place: Place, tmp_path: Path) -> None:
    budget = shared_place.budget(escalations=1_000_000)
    log, dice = tmp_path / "log", random.Random(3)
    killed = 0
    for _ in range(2):
        workers = _workers(4, "hold", shared_place.spec, log)
        for worker in workers:
            time.sleep(dice.random() * 0.15)
            worker.kill()  # SIGKILL, wherever it is
            worker.wait(10)
            killed += 1
    noted = log.stat().st_size
    state = budget.state()
    assert noted > 0
    assert noted <= state.spent["escalations"] <= noted + killed  # at most one per process was not noted in time
    assert state.spent["escalations"] + state.held["escalations"] <= 1_000_000
    deadline = time.monotonic() + 10
    while budget.state().holds and time.monotonic() < deadline:
        time.sleep(0.1)
    after = budget.state()
    assert (after.holds, after.held["escalations"]) == (0, 0)
    assert after.spent["escalations"] == state.spent["escalations"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_budget_in_memory_refuses_to_be_spent_in_a_forked_copy() -> None:
    budget = Budget(escalations=UNITS)
    budget.reserve(ONE).settle(ONE)
    child = os.fork()
    if child == 0:
        try:
            budget.reserve(ONE)
        except StoreUnavailable:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert budget.state().spent["escalations"] == 1
    assert not MemoryStore.shared


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_shared_budget_is_one_budget_after_a_fork(shared_place: Place) -> None:
    budget = shared_place.budget(escalations=UNITS)
    budget.reserve(ONE).settle(ONE)
    child = os.fork()
    if child == 0:
        try:
            budget.reserve(ONE).settle(ONE)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    budget.reserve(ONE).settle(ONE)
    assert budget.state().spent["escalations"] == 3
