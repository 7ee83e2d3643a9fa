"""Generations at once, beside the same ones after another: tokens per second, the slowest tokens, equal answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any
from uuid import uuid4

from s2t_agents.engine.engine import Engine
from s2t_agents.scheduling.language_model import LanguageModel
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
        See ``compared``. Reading the prompts is arithmetic, which running at once cannot save.
    """
    engine = Engine(model)
    prompts = [random_prompt(model, prefix, seed) for seed in range(at_once)]
    answer(engine, random_prompt(model, 16), 32, uuid4().hex)  # warm
    found, _ = compared(model, at_once, lambda n, scope: [answer(engine, prompts[n], tokens, scope)])
    return {"prefix": prefix, "tokens": tokens, **found}


def answer(engine: Engine, prompt: list[int], tokens: int, scope: str) -> Answer:
    """One generation within a cache scope."""
    ids, stamps = [], []
    for step in engine.steps(prompt, Sampling(max_tokens=tokens), cache_scope=scope):
        ids.append(step.token_id)
        stamps.append(time.perf_counter())
    return ids, stamps


def compared(
    model: LanguageModel, at_once: int, work: Callable[[int, str], list[Answer]]
) -> tuple[dict[str, Any], list[list[Answer]]]:
    """The same work for each of ``at_once``, one after another and then each in a thread.

    Args:
        model: named in the result.
        at_once: how many.
        work: given a number and a cache scope of its own for each way, so that neither finds what the other has read.

    Returns:
        Seconds and tokens per second of both, the ratio, ms between tokens (median and p99), whether all answers are
        equal; and the answers given together. Prompts are read inside the measured time. ``step_ratio`` is that of the
        tokens after them, from the median times between tokens.
    """
    if model.device.type == "cuda":  # graphs are captured once in the life of a process
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(lambda n: work(n, "captured"), range(at_once)))
    started, scope = time.perf_counter(), uuid4().hex
    alone = [work(n, scope) for n in range(at_once)]
    alone_s = time.perf_counter() - started
    started, scope = time.perf_counter(), uuid4().hex
    with ThreadPoolExecutor(at_once) as pool:
        together = list(pool.map(lambda n: work(n, scope), range(at_once)))
    together_s = time.perf_counter() - started
    gaps, gaps_alone = (
        sorted(b - a for each in runs for _, stamps in each for a, b in pairwise(stamps)) for runs in (together, alone)
    )
    tokens = sum(len(ids) for each in alone for ids, _ in each)
    found = {
        "model": model.name,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "at_once": at_once,
        "alone_s": alone_s,
        "together_s": together_s,
        "alone_tokens_per_s": tokens / alone_s,
        "together_tokens_per_s": sum(len(ids) for each in together for ids, _ in each) / together_s,
        "ratio": alone_s / together_s,
        "step_ratio": at_once * gaps_alone[len(gaps_alone) // 2] / gaps[len(gaps) // 2],
        "gap_ms_median": gaps[len(gaps) // 2] * MS,
        "gap_ms_p99": gaps[min(len(gaps) - 1, int(len(gaps) * 0.99))] * MS,
        "equal": [[ids for ids, _ in each] for each in alone] == [[ids for ids, _ in each] for each in together],
    }
    return found, together
