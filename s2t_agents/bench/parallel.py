"""Generations at once, beside the same ones after another: tokens per second, the slowest tokens, equal answers."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

from s2t_agents.engine.steps import Engine
from s2t_agents.models.language_model import LanguageModel
from s2t_agents.types import Sampling

from .decode import MS
from .shapes import random_prompt


def run(model: LanguageModel, *, at_once: int = 8, prefix: int = 128, tokens: int = 32) -> dict[str, Any]:
    """Both ways, on the same prompts.

    Args:
        model: see ``shapes.measured_model``.
        at_once: generations, each in its own thread.
        prefix: tokens of each prompt.
        tokens: of each answer.

    Returns:
        Tokens per second of both, their ratio, ms between tokens (median and p99) and whether all answers are equal.
        Prompts are read inside the measured time; reading them is arithmetic, which running at once can not save.
        ``step_ratio`` is that of the tokens after them, from the median times between tokens.
    """
    engine = Engine(model)
    prompts = [random_prompt(model, prefix, seed) for seed in range(at_once)]

    def answer(prompt: list[int]) -> tuple[list[int], list[float]]:
        ids, stamps = [], []
        for step in engine.steps(prompt, Sampling(max_tokens=tokens)):
            ids.append(step.token_id)
            stamps.append(time.perf_counter())
        return ids, stamps

    answer(prompts[0][: max(2, prefix // 8)])  # warm
    model.past.clear()
    started = time.perf_counter()
    alone = [answer(prompt) for prompt in prompts]
    alone_s = time.perf_counter() - started
    model.past.clear()
    started = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        together = list(pool.map(answer, prompts))
    together_s = time.perf_counter() - started
    model.past.clear()
    gaps, gaps_alone = (sorted(b - a for _, stamps in runs for a, b in pairwise(stamps)) for runs in (together, alone))
    return {
        "model": model.name,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "at_once": at_once,
        "prefix": prefix,
        "tokens": tokens,
        "alone_tokens_per_s": at_once * tokens / alone_s,
        "together_tokens_per_s": at_once * tokens / together_s,
        "ratio": alone_s / together_s,
        "step_ratio": at_once * gaps_alone[len(gaps_alone) // 2] / gaps[len(gaps) // 2],
        "gap_ms_median": gaps[len(gaps) // 2] * MS,
        "gap_ms_p99": gaps[min(len(gaps) - 1, int(len(gaps) * 0.99))] * MS,
        "equal": [ids for ids, _ in alone] == [ids for ids, _ in together],
    }
