"""What the selector costs a server: two servers of one model, without and with it, asked in turns.

    python examples/vllm/cost.py --stock 8399:PID --plugin 8400:PID --slm MODEL
    python examples/vllm/cost.py --slm MODEL --nats 0.01 0.1     # triggers for these rates, for S2T_TRIGGER
    python examples/vllm/cost.py --slm MODEL --arithmetic SELECTOR    # what it computes in a step, without a server

Plain greedy requests of a set length, A B B A in every round. Tokens per second by the clock, and milliseconds of CPU a
token of all the server's processes, which other work on the machine changes less.
"""

import argparse
import json
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import httpx
import torch
from langchain_core.messages import HumanMessage

from s2t_agents import LanguageModel
from s2t_agents.bundled import selector_path
from s2t_agents.chat.messages import PromptEncoder
from s2t_agents.demo.world import generate
from s2t_agents.endpoints.completions import logprobs_by_id
from s2t_agents.endpoints.served_selection import read_back
from s2t_agents.engine.engine import Engine
from s2t_agents.proposal import entropy_of
from s2t_agents.selectors import HeadSelector, SelectorConfig
from s2t_agents.selectors.in_logits import LogitSelection
from s2t_agents.training.labels import along
from s2t_agents.types import Sampling

NAME = "s2t-demo"


class Measured(NamedTuple):
    """One batch of answers: tokens a second by the clock, CPU milliseconds a token."""

    rate: float
    cpu_ms: float


def stat_of(pid: str | int) -> list[str] | None:
    """What /proc says of a process, from its state on; None where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None


def cpu_s(pid: int) -> float:
    """Seconds of CPU of a server's processes: this one and all below it."""
    stats = {int(each): stat for each in os.listdir("/proc") if each.isdecimal() and (stat := stat_of(each))}
    found, ticks = {pid}, 0
    while more := {each for each, stat in stats.items() if int(stat[1]) in found} - found:
        found |= more
    for each in found & stats.keys():
        ticks += int(stats[each][11]) + int(stats[each][12])
    return ticks / os.sysconf("SC_CLK_TCK")


class Server:
    """One of the two; given as port and process id."""

    def __init__(self, given: str) -> None:
        port, pid = map(int, given.split(":"))
        self.url, self.pid = f"http://127.0.0.1:{port}/v1/completions", pid
        self.client = httpx.Client(timeout=300)

    def ask(self, prompt: list[int], tokens: int, **more: object) -> dict[str, object]:
        """One greedy answer of so many tokens."""
        body = {"model": NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **more}
        return self.client.post(self.url, json=body).raise_for_status().json()

    def measure(self, prompts: list[list[int]], tokens: int) -> Measured:
        """All at once."""
        before, started = cpu_s(self.pid), time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as pool:
            list(pool.map(lambda prompt: self.ask(prompt, tokens), prompts))
        seconds, written = time.perf_counter() - started, tokens * len(prompts)
        return Measured(written / seconds, 1000 * (cpu_s(self.pid) - before) / written)

    def trigger_rate(self, prompts: list[list[int]], tokens: int) -> float:
        """Share of triggered tokens, read off their log-probabilities."""
        steps = []
        for prompt in prompts:
            wanted = {"logprobs": 20, "return_tokens_as_token_ids": True}
            (choice,) = self.ask(prompt, tokens, **wanted)["choices"]  # type: ignore[misc]
            steps += [read_back(logprobs_by_id(top)) is not None for top in choice["logprobs"]["top_logprobs"]]
        return statistics.mean(steps)


def prompts_of(slm: LanguageModel, count: int, first: int = 0) -> list[list[int]]:
    """Of held-out problems."""
    encoder = PromptEncoder(slm.tokenizer)
    asked = (generate(seed, "heldout", "word").question for seed in range(first, first + count))
    return [encoder.encode([HumanMessage(question)]) for question in asked]


def nats_for(slm: LanguageModel, rates: list[float], tokens: int) -> dict[str, float]:
    """Entropies that these shares of the tokens of greedy answers reach."""
    said = [
        (prompt, [step.token_id for step in Engine(slm).steps(prompt, Sampling(max_tokens=tokens))])
        for prompt in prompts_of(slm, 16, first=5000)
    ]
    entropies = torch.cat([entropy_of(log_probs) for log_probs in along(slm, said)])
    return {f"{rate}": round(float(entropies.quantile(1 - rate)), 3) for rate in rates}


class Rows(NamedTuple):
    """A trigger that fires at the first so many rows."""

    count: int

    def __call__(self, hidden: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        """``[N]`` bool."""
        return torch.arange(len(entropy)) < self.count


def arithmetic(slm: LanguageModel, selector: str, batches: list[int]) -> dict[str, dict[str, float]]:
    """Milliseconds of CPU, on one thread, that the plugin adds to a step: by batch and triggered rows; medians."""
    torch.set_num_threads(1)
    folder = selector_path(selector)
    config = SelectorConfig.load(folder)
    head, weight = HeadSelector.read(folder, slm, config), slm.output_embedding
    found: dict[str, dict[str, float]] = {}
    for batch in batches:
        hidden = torch.randn(batch, slm.hidden_size, generator=torch.Generator().manual_seed(0))
        logits = hidden @ weight.T
        spent: dict[int, list[float]] = {0: [], 1: [], batch: []}
        for _ in range(15):
            for rows, times in spent.items():
                started = time.thread_time()
                LogitSelection(head, Rows(rows), config.k)(hidden, logits)
                times.append(1000 * (time.thread_time() - started))
        found[str(batch)] = {f"{rows} triggered": round(statistics.median(times), 3) for rows, times in spent.items()}
    return found


def main() -> None:
    """Measure; print JSON."""
    parser = argparse.ArgumentParser(description="What the selector costs a vLLM server.")
    parser.add_argument("--slm", required=True, help="the served model's checkpoint")
    parser.add_argument("--nats", type=float, nargs="*", help="print triggers for these rates, and end")
    parser.add_argument("--arithmetic", help="print what this selector computes in a step, and end")
    parser.add_argument("--stock", help="port:pid of the server without a selector")
    parser.add_argument("--plugin", help="port:pid of the server with it")
    parser.add_argument("--at-once", type=int, nargs="*", default=[1, 4, 8, 16])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    slm = LanguageModel.load(given.slm)
    if given.nats:
        print(json.dumps(nats_for(slm, given.nats, given.tokens)))
        return
    if given.arithmetic:
        print(json.dumps(arithmetic(slm, given.arithmetic, given.at_once)))
        return
    stock, plugin = Server(given.stock), Server(given.plugin)
    prompts = prompts_of(slm, max(given.at_once))
    found: dict[str, object] = {"trigger_rate": round(plugin.trigger_rate(prompts[:8], given.tokens), 4)}
    for server in (stock, plugin):  # every prompt is in both prefix caches
        server.measure(prompts, 2)
    for at_once in given.at_once:
        seen: dict[Server, list[Measured]] = {stock: [], plugin: []}
        for _ in range(given.rounds):
            for server in (stock, plugin, plugin, stock):
                seen[server].append(server.measure(prompts[:at_once], given.tokens))
        middle = {
            name: [statistics.median(each) for each in zip(*seen[server], strict=True)]
            for name, server in (("stock", stock), ("plugin", plugin))
        }
        found[str(at_once)] = {
            "tokens_per_s": {name: round(rate, 1) for name, (rate, _) in middle.items()},
            "cpu_ms_a_token": {name: round(cpu, 2) for name, (_, cpu) in middle.items()},
            "plugin_over_stock": {
                "clock": round(middle["stock"][0] / middle["plugin"][0], 3),
                "cpu": round(middle["plugin"][1] / middle["stock"][1], 3),
            },
        }
    print(json.dumps({**found, "load": os.getloadavg()[0], "rounds": 2 * given.rounds}))


if __name__ == "__main__":
    main()
