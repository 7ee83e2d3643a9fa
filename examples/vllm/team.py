"""A team's agents in four processes, on one budget and one ledger; one process is killed in the middle.

    python examples/vllm/team.py --slm vllm://127.0.0.1:8399/s2t-demo --llm http://127.0.0.1:8400/v1 \\
        --store redis://127.0.0.1:6379/0 --ledger team.db

The small model and its selector are on one server, the large model on another; `team.sh` starts both and a Redis. A
store that is no redis:// URL is a SQLite file. Ends with 1 unless everything in the table holds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from s2t_agents.budget import Budget, BudgetStore, RedisStore, SQLiteStore, TokenPrice
from s2t_agents.ledger import Ledger

PRICE = TokenPrice(Decimal("0.50"), Decimal("1.50"), cached_input_usd_per_mtok=Decimal("0.05"))
"""USD per million tokens: what the server costs you."""
TIMEOUT_S, HOLD_S = 5.0, 10.0
"""The LLM's deadline, and when the holds of a killed process come back."""
VICTIM = 1
PATIENCE_S = 600.0


def settings() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="A team of agents in several processes, on one budget.")
    parser.add_argument("--slm", required=True, help="vllm://host:port/name, with S2T_SELECTOR")
    parser.add_argument("--tokenizer", default="s2t-demo", help="of both models")
    parser.add_argument("--llm", required=True, help="up to and including /v1")
    parser.add_argument("--llm-name", default="s2t-demo-llm", help="as its server lists it")
    parser.add_argument("--store", required=True, help="redis://host:port/0, or a file")
    parser.add_argument("--ledger", required=True, help="a file, .db or .jsonl")
    parser.add_argument("--team", default=f"team-{os.getpid()}", help="the budget's name in the store")
    parser.add_argument("--usd", default="0.004", help="what the whole team may spend")
    parser.add_argument("--escalations", type=int, default=60, help="and how often it may ask")
    parser.add_argument("--questions", type=int, default=32, help="of the whole team")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--allow-http", action="store_true", help="plain HTTP to other machines")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print what happened as JSON")
    return parser.parse_args()


def store_of(place: str) -> BudgetStore:
    """Where the team's budget lives."""
    return RedisStore(place, timeout_s=10) if place.startswith(("redis://", "rediss://")) else SQLiteStore(place)


def team_budget(given: argparse.Namespace) -> Budget:
    """One meter, whichever process opens it."""
    store = store_of(given.store)
    return Budget(name=given.team, usd=given.usd, escalations=given.escalations, store=store)


def name_of(worker: int) -> str:
    """Of a worker's agent, and of its part of the budget."""
    return f"worker-{worker}"


def work(given: argparse.Namespace) -> None:
    """One process of agents: answers every n-th question and prints a line of JSON for each."""
    from langchain.agents import create_agent
    from langchain_core.messages import AIMessage

    from s2t_agents import ChatS2T, Escalation, OpenAILLM
    from s2t_agents.demo.agent import tools_of
    from s2t_agents.demo.world import demo_question, grade

    name = name_of(given.worker)
    llm = OpenAILLM(given.llm, given.llm_name, price=PRICE, timeout_s=TIMEOUT_S, allow_http=given.allow_http)
    model = ChatS2T(
        model=given.slm,
        model_kwargs={"tokenizer": given.tokenizer, "allow_http": given.allow_http},
        selector="server",
        escalation=Escalation(llm, margin=1.0, hold_s=HOLD_S),
        budget=team_budget(given).child(name),
        ledger=Ledger.open(given.ledger),
        max_tokens=128,
    )
    for at in range(given.worker, given.questions, given.workers):
        problem = demo_question(1000 + at)
        agent = create_agent(model, tools=tools_of(problem), system_prompt=problem.system, name=name)
        found = agent.invoke({"messages": [{"role": "user", "content": problem.question}]}, {"recursion_limit": 12})
        answers = [each.response_metadata["s2t"] for each in found["messages"] if isinstance(each, AIMessage)]
        line = {
            "question": at,
            "right": grade(found["messages"][-1].text, problem),
            "trace_ids": [each["trace_id"] for each in answers],
            **{key: sum(each[key] for each in answers) for key in ("escalations", "refused")},
        }
        print(json.dumps(line), flush=True)


@dataclass
class Worker:
    """A process of agents and what it has printed so far."""

    name: str
    process: subprocess.Popen[str]
    lines: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(json.loads(line))

    def end(self) -> int:
        """Wait for it; its exit status."""
        status = self.process.wait(PATIENCE_S)
        self.reader.join(10)
        return status


def kill_while_it_asks(victim: Worker, part: Budget, begun: Callable[[], bool]) -> int:
    """kill -9 in the middle of a question to the LLM, once the team has begun; how many holds it left.

    The process is stopped for a moment, so that the hold that was seen is still there when it dies.
    """
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until and victim.process.poll() is None:
        if not begun() or not part.state().holds:
            time.sleep(0.002)
            continue
        victim.process.send_signal(signal.SIGSTOP)
        time.sleep(0.05)  # what it had sent to the store has arrived
        if part.state().holds:
            victim.process.kill()
            victim.process.wait()
            return part.state().holds
        victim.process.send_signal(signal.SIGCONT)
    raise SystemExit(f"{victim.name} asked nothing that it could have been killed in.")


def seconds_until(true: Callable[[], bool], at_most: float) -> float | None:
    """How long it took; None where it took longer."""
    started = time.monotonic()
    while time.monotonic() < started + at_most:
        if true():
            return time.monotonic() - started
        time.sleep(0.05)
    return None


def watch(team: Budget, over: threading.Event, fullest: list[Decimal]) -> None:
    """Note the most that was ever spent and held together."""
    while not over.wait(0.02):
        state = team.state()
        fullest.append(Decimal(state.spent["usd"] or 0) + Decimal(state.held["usd"]))


def run_team(given: argparse.Namespace) -> dict[str, Any]:
    """Start the workers, kill one of them, wait for the others; what happened."""
    team, over, fullest = team_budget(given), threading.Event(), [Decimal(0)]
    parts = [team.child(name_of(at)) for at in range(given.workers)]
    watcher = threading.Thread(target=watch, args=(team, over, fullest), daemon=True)
    arguments = {name: value for name, value in vars(given).items() if name not in ("worker", "json", "allow_http")}
    command = [part for name, value in arguments.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command += ["--allow-http"] * given.allow_http
    workers: list[Worker] = []
    try:
        for at in range(given.workers):
            line = [sys.executable, __file__, *command, "--worker", str(at)]
            workers.append(Worker(name_of(at), subprocess.Popen(line, stdout=subprocess.PIPE, text=True)))
        watcher.start()
        left_holds = kill_while_it_asks(workers[VICTIM], parts[VICTIM], lambda: any(each.lines for each in workers))
        before = [len(each.lines) for each in workers]
        returned_s = seconds_until(lambda: parts[VICTIM].state().holds == 0, 2 * HOLD_S)
        others = [each for each in workers if each is not workers[VICTIM]]
        statuses = [each.end() for each in others]
    finally:
        for each in workers:
            if each.process.poll() is None:
                each.process.kill()
                each.process.wait()
        over.set()
    watcher.join()
    return {
        "team": team.state().as_dict() | {"overrun": {unit: str(much) for unit, much in team.state().overrun.items()}},
        "most_spent_and_held": f"{max(fullest):f}",
        "looks": len(fullest),
        "killed": {"worker": workers[VICTIM].name, "holds": left_holds, "returned_s": returned_s},
        "answered_after_the_kill": sum(map(len, (each.lines for each in others))) - sum(before) + before[VICTIM],
        "exit_statuses": statuses,
        "workers": {each.name: _told(each, part) for each, part in zip(workers, parts, strict=True)},
        "checks": checks(given, team, parts, workers, fullest, returned_s, statuses),
    }


def _told(worker: Worker, part: Budget) -> dict[str, Any]:
    asked = {name: sum(line[name] for line in worker.lines) for name in ("right", "escalations", "refused")}
    return {"answers": len(worker.lines), **asked, "usd": f"{part.state().spent['usd'] or 0:f}"}


def checks(
    given: argparse.Namespace,
    team: Budget,
    parts: list[Budget],
    workers: list[Worker],
    fullest: list[Decimal],
    returned_s: float | None,
    statuses: list[int],
) -> dict[str, bool]:
    """What has to hold, and whether it does."""
    ledger, state = Ledger.reading(given.ledger), team.state()
    kept = {record.trace_id for record in ledger.records()}
    booked = {agent: totals.cost_usd.llm.usd for agent, totals in ledger.totals("agent").items()}
    spent = [Decimal(part.state().spent["usd"] or 0) for part in parts]
    share = [len(range(at, given.questions, given.workers)) for at in range(given.workers)]
    alive = [at for at in range(given.workers) if at != VICTIM]
    return {
        "never overspent": max(fullest) <= Decimal(given.usd) and not any(state.overrun.values()),
        "nothing is held at the end": state.holds == 0,
        "the parts add up to the team's": sum(spent) == state.spent["usd"],
        "every answer is in the ledger": all(
            each in kept for worker in workers for line in worker.lines for each in line["trace_ids"]
        ),
        "ledger and budget agree": all(Decimal(booked.get(workers[at].name) or 0) == spent[at] for at in alive),
        "the killed worker's holds came back": returned_s is not None,
        "the others answered all of theirs": all(len(workers[at].lines) == share[at] for at in alive),
        "and ended well": not any(statuses),
    }


def show(found: dict[str, Any]) -> None:
    """As a table for people."""
    print(f"{'':10} {'answers':>8} {'right':>6} {'LLM picks':>10} {'refused':>8} {'USD':>12}")
    for name, part in found["workers"].items():
        row = f"{part['answers']:8} {part['right']:6} {part['escalations']:10} {part['refused']:8} {part['usd']:>12}"
        print(f"{name:10} {row}{'  killed' if name == found['killed']['worker'] else ''}")
    team, killed = found["team"], found["killed"]
    print(f"\nof ${team['limit']['usd']} and {team['limit']['escalations']} questions: spent ${team['spent']['usd']}")
    print(f"and {team['spent']['escalations']}; at most ${found['most_spent_and_held']} were spent and held together.")
    back = "never" if killed["returned_s"] is None else f"after {killed['returned_s']:.1f} s"
    print(f"{killed['worker']} was killed with {killed['holds']} hold: it came back {back}; meanwhile and after,")
    print(f"the others answered {found['answered_after_the_kill']} questions.\n")
    for check, holds in found["checks"].items():
        print(f"{'ok' if holds else 'NO':3} {check}")


def main() -> None:
    """The team, or one worker of it."""
    given = settings()
    if given.worker is not None:
        work(given)
        return
    Path(given.ledger).absolute().parent.mkdir(parents=True, exist_ok=True)
    found = run_team(given)
    print(json.dumps(found, indent=2)) if given.json else show(found)
    raise SystemExit(0 if all(found["checks"].values()) else 1)


if __name__ == "__main__":
    main()
