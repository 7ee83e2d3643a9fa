"""All of ``s2t bench decode``: time per token, generations at once, turns, and how costs grow, in one result."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from rich.console import Group
from rich.table import Table

from s2t_agents.backends.torch.cpu_features import is_emulated
from s2t_agents.bundled import SLM
from s2t_agents.errors import ConfigError
from s2t_agents.scheduling.language_model import LanguageModel

from . import chat, decode, growth, loops, parallel, turns
from .growth import KS
from .shapes import measured_model
from .targets import CHAT, GREEDY, Verdict, targets_of
from .targets import PARTS as TARGET_PARTS

MODELS = (SLM, "qwen2.5-0.5b")

PARTS = ("decode", "chat", "parallel", "loops", "turns", "growth")


@dataclass(frozen=True)
class Sizes:
    """What is measured of one model.

    Attributes:
        decode: prefixes in tokens, with how often each row is run.
        tokens: of an answer of ``decode``.
        rates: of triggers that are run there; others are composed.
        chat: tokens of questions to the chat model.
        chat_tokens: of its answers.
        chat_repeats: of each row.
        parallel: generations at once.
        parallel_tokens: of each.
        growth: prefixes in tokens.
        growth_ks: numbers of candidates.
        growth_steps: of each.
        turns: settings of ``turns.run``.
        loops: settings of ``loops.run``.
    """

    decode: Sequence[tuple[int, int]]
    tokens: int
    rates: tuple[float, ...]
    chat: Sequence[int]
    chat_tokens: int
    chat_repeats: int
    parallel: Sequence[int]
    parallel_tokens: int
    growth: tuple[int, ...]
    growth_ks: tuple[int, ...] = KS
    growth_steps: int = 7
    turns: Mapping[str, int] = field(default_factory=dict)
    loops: Mapping[str, int] = field(default_factory=dict)


SMALL = Sizes(
    decode=((128, 5), (896, 5)),
    tokens=101,
    rates=decode.RATES,
    chat=(64, 512),
    chat_tokens=101,
    chat_repeats=5,
    parallel=(1, 2, 4, 8, 16),
    parallel_tokens=101,
    growth=(128, 256, 512, 960),
    growth_steps=9,
    turns={"repeats": 5},
)
LARGE = Sizes(
    decode=((128, 5), (1024, 3)),
    tokens=21,
    rates=(0.0, 0.2),
    chat=(128,),
    chat_tokens=32,
    chat_repeats=5,
    parallel=(1, 8),
    parallel_tokens=32,
    growth=(128, 1024),
    growth_steps=5,
    turns={"system": 128, "repeats": 2},
)
LONG = replace(
    LARGE,
    decode=((128, 7), (1024, 5), (4096, 3)),
    chat_tokens=48,
    chat_repeats=7,
    parallel=(1, 4, 8, 16),
    parallel_tokens=48,
    growth=(128, 1024, 4096, 8192),
    growth_steps=7,
    turns={"system": 128, "repeats": 3},
)
QUICK = Sizes(
    decode=((32, 1),),
    tokens=6,
    rates=(0.0, 0.2),
    chat=(16,),
    chat_tokens=6,
    chat_repeats=1,
    parallel=(2,),
    parallel_tokens=6,
    growth=(16,),
    growth_ks=(1, 8),
    growth_steps=3,
    turns={"system": 32, "turns": 3, "repeats": 1},
    loops={"at_once": 2, "system": 16, "new": 8, "turns": 2, "tokens": 12, "long_prompt": 32},
)


def run(
    say: Callable[[str], None] = lambda _: None,
    *,
    models: Sequence[str] = MODELS,
    parts: Sequence[str] = PARTS,
    long: bool = False,
    quick: bool = False,
) -> dict[str, Any]:
    """The bundled SLM (one thread) and a Qwen2.5-0.5B of random weights (all cores, see ``usual_dtype``).

    Args:
        say: told what is measured next.
        models: some of ``MODELS``.
        parts: some of ``PARTS``.
        long: prompts of 4,096 and 8,192 tokens, too, and more repeats.
        quick: few tokens, and a tiny random model in place of the second: shows that it runs, measures nothing.

    Returns:
        See the parts; ``targets`` sets the figures beside what was wanted, where all parts were measured.

    Raises:
        ConfigError: no such model or part.
    """
    for given, known in ((models, MODELS), (parts, PARTS)):
        if unknown := [each for each in given if each not in known]:
            raise ConfigError(f"{unknown[0]!r} is not measured.", hint=f"One of {', '.join(known)}.")
    started, threads = time.perf_counter(), torch.get_num_threads()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in PARTS if name in parts}
    try:
        for name in models:
            bundled = name == SLM
            torch.set_num_threads(1 if bundled else threads)
            dtype = torch.float32 if bundled else usual_dtype()
            model = measured_model(name if bundled or not quick else "tiny", dtype=dtype)
            sizes = QUICK if quick else SMALL if bundled else LONG if long else LARGE
            for part in found:
                say(f"{model.name}: {part}")
                found[part] += MEASURED[part](model, sizes)
    finally:
        torch.set_num_threads(threads)
    whole = set(parts) >= set(TARGET_PARTS) and set(models) >= set(MODELS)
    return {
        "bench": "decode",
        **found,
        **({"targets": targets(found)} if whole else {}),
        "not_measured": "the 1.5B shape and everything on a GPU (`s2t bench gpu` does that)",
        "threads": {"bundled": 1, "0.5B": threads},
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seconds": time.perf_counter() - started,
    }


def _decode(model: LanguageModel, sizes: Sizes) -> list[dict[str, Any]]:
    return [
        decode.run(model, prefix=prefix, tokens=sizes.tokens, repeats=repeats, rates=sizes.rates)
        for prefix, repeats in sizes.decode
    ]


def _chat(model: LanguageModel, sizes: Sizes) -> list[dict[str, Any]]:
    return [
        chat.run(model, prefix=prefix, tokens=sizes.chat_tokens, repeats=sizes.chat_repeats) for prefix in sizes.chat
    ]


def _parallel(model: LanguageModel, sizes: Sizes) -> list[dict[str, Any]]:
    return [parallel.run(model, at_once=count, tokens=sizes.parallel_tokens) for count in sizes.parallel]


def _loops(model: LanguageModel, sizes: Sizes) -> list[dict[str, Any]]:
    return [loops.run(model, **sizes.loops)]


def _turns(model: LanguageModel, sizes: Sizes) -> list[dict[str, Any]]:
    return [turns.run(model, **sizes.turns)]


def _growth(model: LanguageModel, sizes: Sizes) -> list[dict[str, Any]]:
    return [growth.run(model, prefixes=sizes.growth, ks=sizes.growth_ks, steps=sizes.growth_steps)]


MEASURED: dict[str, Callable[[LanguageModel, Sizes], list[dict[str, Any]]]] = {
    "decode": _decode,
    "chat": _chat,
    "parallel": _parallel,
    "loops": _loops,
    "turns": _turns,
    "growth": _growth,
}


def usual_dtype() -> torch.dtype:
    """In which a bf16 checkpoint of that size is read on this machine."""
    return torch.float32 if is_emulated(torch.bfloat16) else torch.bfloat16


def targets(parts: Mapping[str, Any]) -> dict[str, Verdict]:
    """Each target, the figure found, and whether that meets it; the bundled model is held to its speed alone."""
    bundled, large = (parts["turns"][at]["model"] for at in (0, -1))
    over_generate = f"{bundled}: {GREEDY}"
    small = targets_of(bundled, parts, over_generate=1 / 1.5, over_engine=1.05)
    wanted = (over_generate, f"{bundled}: {CHAT}")
    return {**{name: small[name] for name in wanted if name in small}, **targets_of(large, parts)}


def table(result: dict[str, Any]) -> Group:
    """The result for people."""
    return Group(
        *map(_steps, result.get("decode", ())),
        _through_chat(result.get("chat", ())),
        _at_once(result.get("parallel", ()), result.get("loops", ())),
        _targets(result.get("targets", {})),
    )


def _titled(title: str, *heads: str) -> Table:
    return Table(*heads, title=title, title_justify="left")


FIRST = "first token cold / warm, ms"


def _steps(part: dict[str, Any]) -> Table:
    title = f"{part['model']}, {part['dtype']}, after {part['prefix']} tokens"
    shown = _titled(title, "", "ms a token", "tokens/s", "over generate", "over greedy", FIRST)
    for name, row in part["rows"].items():
        star = " *" if row.get("composed") else ""
        speeds = f"{row['ms_per_token']:.2f}", f"{row['tokens_per_s']:.1f}"
        shown.add_row(name + star, *speeds, f"{row['over_generate']:.2f}", f"{row['over_greedy']:.3f}", _first(row))
    return shown


def _through_chat(parts: Iterable[dict[str, Any]]) -> Table:
    heads = ("through the chat model", "ms a token", "over engine", "over generate", FIRST)
    shown = _titled("ChatS2T beside the bare engine", *heads)
    for part in parts:
        for name, row in part["rows"].items():
            what = f"{part['model']} after {part['prompt_tokens']['plain']}, {name}"
            ratios = f"{row['over_engine']:.3f}", f"{row['over_generate']:.2f}"
            shown.add_row(what, f"{row['ms_per_token']:.2f}", *ratios, _first(row))
    return shown


def _at_once(prompts: Iterable[dict[str, Any]], loops: Iterable[dict[str, Any]]) -> Table:
    heads = ("at once", "one by one, tokens/s", "together", "ratio", "p99 gap, ms", "equal", "of the bound")
    shown = _titled("generations at once", *heads)
    for kind, each in [*(("", each) for each in prompts), *(("agent loops", each) for each in loops)]:
        what = f"{each['model']} {each['at_once']} {kind}"
        speeds = f"{each['alone_tokens_per_s']:.1f}", f"{each['together_tokens_per_s']:.1f}", f"{each['ratio']:.2f}"
        share = f"{each['bound']['share']:.0%}" if "bound" in each else ""
        shown.add_row(what, *speeds, f"{each['gap_ms_p99']:.1f}", str(each["equal"]), share)
    return shown


def _targets(found: Mapping[str, Verdict]) -> Table:
    shown = _titled("targets (* composed from measured parts)", "target", "wanted", "figure", "met")
    for name, each in found.items():
        shown.add_row(name, each["wanted"], f"{each['figure']:.4g}", "yes" if each["met"] else "NO")
    return shown


def _first(row: dict[str, Any]) -> str:
    times = [row.get(f"first_token_{kind}_ms") for kind in ("cold", "warm")]
    return " / ".join("-" if each is None else f"{each:.0f}" for each in times)
