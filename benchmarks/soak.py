"""Eight agents for minutes, cancelled at random, on tight budgets: what is left behind at the end?"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import random
import resource
import threading
import time
from pathlib import Path
from typing import Any

import torch

from s2t_agents import Budget, ChatS2T, LocalLLM
from s2t_agents.backends.torch.kv_cache import KVCache
from s2t_agents.demo.world import generate
from s2t_agents.errors import BudgetExceeded

AGENTS = 8
LASTING = 3
"""Minutes from which memory has to be flat: caches are full by then."""
FLAT = 0.04
"""Share of the resident memory by which it may grow in the second half."""
PAGE = resource.getpagesize()


def rss_mb() -> float:
    """Resident memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20


def trimmed_rss_mb() -> float | None:
    """Resident memory once the C library has given back what is free in it; None where it cannot be told to."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        return rss_mb()
    return None


async def agent(model: ChatS2T, budget: Budget, number: int, until: float, done: dict[str, int]) -> None:
    """Asks one question after another; every third is given up midway, as a task or as a stream."""
    rng = random.Random(number)
    while time.monotonic() < until:
        problem = generate(rng.randrange(10**6), "heldout", rng.choice(("word", "tool", "call")))
        asked = model.bind_tools(list(problem.tools)) if problem.tools else model
        call: dict[str, Any] = {
            "s2t_budget": budget.child(f"turn {rng.random()}", escalations=rng.randint(0, 2)),
            "s2t_agent": f"a{number}",
        }
        try:
            luck = rng.random()
            if luck < 0.2:
                task = asyncio.create_task(asked.ainvoke(list(problem.prompt), **call))
                await asyncio.sleep(rng.random() * 0.3)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                done["cancelled"] += 1
            elif luck < 0.4:
                stream = asked.astream(list(problem.prompt), **call)
                async for _ in stream:
                    if rng.random() < 0.15:
                        break
                await stream.aclose()  # type: ignore[attr-defined]
                done["left"] += 1
            else:
                await asked.ainvoke(list(problem.prompt), **call)
                done["answered"] += 1
        except BudgetExceeded:
            done["refused"] += 1


async def soak(minutes: float) -> dict[str, Any]:
    """Run, stop, and look at what is left."""
    before = live_kv_caches()
    budget = Budget(escalations=100_000, llm_tokens=100_000_000)
    model = ChatS2T(selector="s2t-demo", escalation=LocalLLM("s2t-demo-llm"), budget=budget, max_tokens=96)
    slm = model.engine.slm
    slm.prefix_cache.limit_bytes = 64 * 2**20
    done = dict.fromkeys(("answered", "cancelled", "left", "refused"), 0)
    until = time.monotonic() + 60 * minutes
    memory: list[float] = []
    every_s = max(0.5, 60 * minutes / 20)

    async def watch() -> None:
        while time.monotonic() < until:
            await asyncio.sleep(every_s)
            memory.append(rss_mb())

    await asyncio.gather(watch(), *(agent(model, budget, n, until, done) for n in range(AGENTS)))
    threads = sorted({thread.name.rsplit("_", 1)[0] for thread in threading.enumerate()})
    kept_bytes, kept = slm.prefix_cache.nbytes, len(slm.prefix_cache)
    slm.prefix_cache.clear()
    state = budget.state().as_dict()
    return {
        "minutes": minutes,
        "agents": AGENTS,
        **done,
        "held_at_the_end": state["held"],
        "spent": state["spent"],
        "waiting_requests": len(slm.scheduler._waiting),
        "running_generations": model.engine.admission.running,
        "kept_kv": {"entries": kept, "mb": kept_bytes / 2**20, "limit_mb": 64},
        "live_kv_caches_after_clearing": live_kv_caches() - before,  # the process may hold others'
        "threads": threads,
        "rss_mb": {
            "every_s": every_s,
            "series": [round(each, 1) for each in memory],
            "growth_in_the_second_half": memory[-1] - memory[len(memory) // 2],
            "end": rss_mb(),
            "end_trimmed": trimmed_rss_mb(),
        },
    }


def live_kv_caches() -> int:
    """In this process, once what nobody holds is collected."""
    gc.collect()
    return sum(isinstance(each, KVCache) for each in gc.get_objects())


def leaks(result: dict[str, Any]) -> list[str]:
    """What is left that should not be; the LLM's idle prefixes are few and bounded."""
    found = [name for name in ("waiting_requests", "running_generations") if result[name]]
    found += ["held"] * any(result["held_at_the_end"].values())
    found += ["kv over its limit"] * (result["kept_kv"]["mb"] > result["kept_kv"]["limit_mb"])
    memory, lasting = result["rss_mb"], result["minutes"] >= LASTING
    found += ["memory"] * (lasting and memory["growth_in_the_second_half"] > FLAT * memory["end"])
    found += ["kv caches"] * (result["live_kv_caches_after_clearing"] > 2 * AGENTS)
    return found


def run(minutes: float = 5.0) -> dict[str, Any]:
    """``soak`` on one thread, and what ``leaks`` finds in it, as ``leaked``."""
    torch.set_num_threads(1)
    result = asyncio.run(soak(minutes))
    return {**result, "leaked": leaks(result)}
