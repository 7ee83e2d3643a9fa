"""Turn ten of a conversation: time to the first token, beside reading the new tokens alone over KV that is there."""

from __future__ import annotations

import statistics
import time
from typing import Any

from s2t_agents.engine.engine import Engine
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.scheduling.sequence import TokenSequence
from s2t_agents.types import Sampling

from .decode import MS, finish
from .shapes import precision_of, random_prompt


def run(model: LanguageModel, *, system: int = 128, new: int = 40, turns: int = 10, repeats: int = 3) -> dict[str, Any]:
    """A conversation of ``turns``, several times over.

    Args:
        model: see ``shapes.measured_model``.
        system: tokens of system prompt and tools.
        new: tokens that each turn adds before the answer (8 tokens).
        turns: the last of them is measured.
        repeats: conversations; the median counts.

    Returns:
        ms to the first token of the last turn: with its past, reading only the new tokens over KV that is at hand, and
        reading everything anew; ratios to the second, and the tokens that were reused.
    """
    kept, bare, anew, reused = [], [], [], 0
    for repeat in range(repeats):
        model.prefix_cache.clear()
        prompt = random_prompt(model, system, seed=repeat)
        for turn in range(turns):
            prompt = [*prompt, *random_prompt(model, new, seed=1000 * repeat + turn)]
            steps = Engine(model).steps(prompt, Sampling(max_tokens=8))
            started = time.perf_counter()
            first = next(steps)
            took, reused = time.perf_counter() - started, first.reused_tokens or 0
            before = len(prompt)
            prompt = [*prompt, first.token_id, *(step.token_id for step in steps)]
        kept.append(took)
        prefix = TokenSequence(model)
        prefix.append(prompt[:reused])
        finish(model)
        started = time.perf_counter()
        prefix.append(prompt[reused:before])
        finish(model)
        bare.append(time.perf_counter() - started)
        model.prefix_cache.clear()
        started = time.perf_counter()
        next(Engine(model).steps(prompt[:before]))
        anew.append(time.perf_counter() - started)
    model.prefix_cache.clear()
    ms = {name: statistics.median(s) * MS for name, s in (("kept", kept), ("new_alone", bare), ("anew", anew))}
    return {
        "model": model.name,
        "dtype": precision_of(model),
        "turn": turns,
        "prompt_tokens": before,
        "reused_tokens": reused,
        "first_token_ms": ms,
        "kept_over_new_alone": ms["kept"] / ms["new_alone"],
        "anew_over_new_alone": ms["anew"] / ms["new_alone"],
    }
