"""How costs grow: a selection with K, a step with the prefix."""

from __future__ import annotations

import statistics
from typing import Any

from s2t_agents.engine.engine import Engine
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.types import Sampling

from .decode import MS, at_rate, selectors
from .shapes import random_prompt

KS = (1, 2, 4, 8, 16, 32, 64)


def run(model: LanguageModel, *, prefixes: tuple[int, ...], ks: tuple[int, ...] = KS, steps: int = 9) -> dict[str, Any]:
    """Medians over ``steps`` steps, each with a selection.

    Args:
        model: see ``shapes.measured_model``.
        prefixes: tokens of the prompt; K is 8 there.
        ks: candidates; the first prefix is taken there.
        steps: tokens generated for each figure.

    Returns:
        ms of a step and of a selection of each kind, by prefix and by K.
    """
    return {
        "model": model.name,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "by_prefix": {str(n): _parts(model, n, 8, steps) for n in prefixes},
        "by_k": {str(k): _parts(model, prefixes[0], k, steps) for k in ks},
    }


def _parts(model: LanguageModel, prefix: int, k: int, steps: int) -> dict[str, float]:
    prompt, found = random_prompt(model, prefix), {}
    for kind, selector in selectors(model).items():
        engine = Engine(model, k=k, trigger=at_rate(1.0), selector=selector)
        taken = list(engine.steps(prompt, Sampling(max_tokens=steps + 1)))[1:]
        found["step_ms"] = statistics.median(step.timings.propose for step in taken) * MS
        found[f"{kind}_ms"] = statistics.median(step.timings.select for step in taken) * MS
    return found
