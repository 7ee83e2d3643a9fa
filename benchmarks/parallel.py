"""Generations at once, beside the same ones after another: tokens per second, the slowest tokens, equal answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

from s2t_agents.backends.torch.language_model import LanguageModel
from s2t_agents.engine.engine import Engine
from s2t_agents.types import Sampling

from .decode import MS
from .shapes import random_prompt

Answer = tuple[list[int], list[float]]
"""Its tokens, and when each came."""


def run(model: LanguageModel, *, at_once: int = 8, prefix: int = 128, tokens: int = 32) -> dict[str, Any]:
    """Answers to prompts that nobody has read before.

    Args:
        model: see ``shapes.measured_model``.
        at_once: generations, each in its own thread.
        prefix: tokens of each prompt.
        tokens: of each answer.

    Returns:
        See ``both_ways``. Reading the prompts is arithmetic, which running at once cannot save.
    """
    engine = Engine(model)
    prompts = [random_prompt(model, prefix, seed) for seed in range(at_once)]
    found = both_ways(model, at_once, lambda n: [answer(engine, prompts[n], tokens)])
    return {"prefix": prefix, "tokens": tokens, **found}


def loops(
    model: LanguageModel, *, at_once: int = 8, system: int = 128, new: int = 32, turns: int = 3, tokens: int = 48
) -> dict[str, Any]:
    """Agents: each sends its whole conversation again every turn, and all share a system prompt and tools.

    Args:
        model: see ``shapes.measured_model``.
        at_once: agents, each in its own thread.
        system: tokens that all conversations begin with.
        new: tokens that each turn adds before the answer: a question, a tool's result.
        turns: of each agent.
        tokens: of each answer.

    Returns:
        See ``both_ways``.
    """
    engine, shared = Engine(model), random_prompt(model, system)

    def agent(n: int) -> list[Answer]:
        said, conversation = [], shared
        for turn in range(turns):
            conversation = [*conversation, *random_prompt(model, new, 1 + n * turns + turn)]
            said.append(answer(engine, conversation, tokens))
            conversation = [*conversation, *said[-1][0]]
        return said

    found = both_ways(model, at_once, agent)
    return {"system": system, "new": new, "turns": turns, "tokens": tokens, **found}


def answer(engine: Engine, prompt: list[int], tokens: int) -> Answer:
    """One generation."""
    ids, stamps = [], []
    for step in engine.steps(prompt, Sampling(max_tokens=tokens)):
        ids.append(step.token_id)
        stamps.append(time.perf_counter())
    return ids, stamps


def both_ways(model: LanguageModel, at_once: int, work: Callable[[int], list[Answer]]) -> dict[str, Any]:
    """The same work for each of ``at_once``, one after another and then each in a thread; past KV is dropped before.

    Returns:
        Tokens per second of both, their ratio, ms between tokens (median and p99) and whether all answers are equal.
        Prompts are read inside the measured time. ``step_ratio`` is that of the tokens after them, from the median
        times between tokens.
    """
    answer(Engine(model), random_prompt(model, 16), 32)  # warm
    if model.static is not None:  # graphs are captured once in the life of a process
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(work, range(at_once)))
    model.past.clear()
    started = time.perf_counter()
    alone = [said for n in range(at_once) for said in work(n)]
    alone_s = time.perf_counter() - started
    model.past.clear()
    started = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        together = [said for each in pool.map(work, range(at_once)) for said in each]
    together_s = time.perf_counter() - started
    model.past.clear()
    gaps, gaps_alone = (sorted(b - a for _, stamps in runs for a, b in pairwise(stamps)) for runs in (together, alone))
    tokens = sum(len(ids) for ids, _ in alone)
    return {
        "model": model.name,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "at_once": at_once,
        "alone_tokens_per_s": tokens / alone_s,
        "together_tokens_per_s": sum(len(ids) for ids, _ in together) / together_s,
        "ratio": alone_s / together_s,
        "step_ratio": at_once * gaps_alone[len(gaps_alone) // 2] / gaps[len(gaps) // 2],
        "gap_ms_median": gaps[len(gaps) // 2] * MS,
        "gap_ms_p99": gaps[min(len(gaps) - 1, int(len(gaps) * 0.99))] * MS,
        "equal": [ids for ids, _ in alone] == [ids for ids, _ in together],
    }
