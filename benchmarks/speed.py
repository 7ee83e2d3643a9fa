"""All of ``s2t bench decode``: time per token, generations at once, turns, and how costs grow, in one result."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from rich.console import Group
from rich.table import Table

from s2t_agents.backends.torch.cpu_features import widens
from s2t_agents.bundled import SLM
from s2t_agents.scheduling.language_model import LanguageModel

from . import chat, decode, growth, loops, parallel, turns
from .shapes import measured_model
from .targets import CHAT, GREEDY, Verdict, targets_of


def run(say: Callable[[str], None] = lambda _: None, *, quick: bool = False) -> dict[str, Any]:
    """Everything on the bundled SLM (one thread) and a Qwen2.5-0.5B of random weights (all cores, see ``usual_dtype``).

    Args:
        say: told what is measured next.
        quick: a tiny random model in place of the second, and few tokens: shows that it runs, measures nothing.

    Returns:
        See the parts; ``targets`` sets the figures beside what was wanted.
    """
    started, threads = time.perf_counter(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        say("the bundled model")
        small = _small(quick)
        torch.set_num_threads(threads)
        say("the 0.5B shape")
        large = _large(quick, say)
    finally:
        torch.set_num_threads(threads)
    parts = {name: [*small[name], *large[name]] for name in small}
    return {
        "bench": "decode",
        **parts,
        "targets": targets(parts),
        "not_measured": "the 1.5B shape and everything on a GPU (`s2t bench gpu` does that)",
        "threads": {"bundled": 1, "0.5B": threads},
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seconds": time.perf_counter() - started,
    }


def _small(quick: bool) -> dict[str, list[dict[str, Any]]]:
    model = measured_model(SLM, dtype=torch.float32)
    tokens, repeats = (6, 1) if quick else (101, 5)
    return {
        "decode": [
            decode.run(model, prefix=n, tokens=tokens, repeats=repeats) for n in ((128,) if quick else (128, 896))
        ],
        "chat": [chat.run(model, prefix=n, tokens=tokens, repeats=repeats) for n in ((16,) if quick else (64, 512))],
        "parallel": [parallel.run(model, at_once=n, tokens=tokens) for n in ((2,) if quick else (1, 2, 4, 8, 16))],
        "loops": [_loops(model, quick)],
        "turns": [turns.run(model, repeats=1 if quick else 5)],
        "growth": [
            growth.run(model, prefixes=(32,) if quick else (128, 256, 512, 960), ks=(1, 8) if quick else growth.KS)
        ],
    }


def _large(quick: bool, say: Callable[[str], None]) -> dict[str, list[dict[str, Any]]]:
    model = measured_model("tiny" if quick else "qwen2.5-0.5b", dtype=usual_dtype())
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in PARTS}
    for prefix, repeats in ((32, 1),) if quick else ((128, 7), (1024, 5), (4096, 3)):
        say(f"  after {prefix} tokens")
        found["decode"].append(decode.run(model, prefix=prefix, tokens=21, repeats=repeats, rates=(0.0, 0.2)))
    say("  through the chat model")
    found["chat"].append(
        chat.run(model, prefix=16 if quick else 128, tokens=6 if quick else 48, repeats=1 if quick else 7)
    )
    for at_once in (2,) if quick else (1, 4, 8, 16):
        say(f"  {at_once} at once")
        found["parallel"].append(parallel.run(model, at_once=at_once, tokens=8 if quick else 48))
    say("  agent loops")
    found["loops"].append(_loops(model, quick))
    say("  growth")
    prefixes, ks = ((16,), (1, 8)) if quick else ((128, 1024, 4096, 8192), growth.KS)
    found["growth"].append(growth.run(model, prefixes=prefixes, ks=ks, steps=3 if quick else 7))
    say("  turns")
    found["turns"].append(
        turns.run(model, system=32 if quick else 128, turns=3 if quick else 10, repeats=1 if quick else 3)
    )
    return found


PARTS = ("decode", "chat", "parallel", "loops", "turns", "growth")


def usual_dtype() -> torch.dtype:
    """In which a bf16 checkpoint of that size is read on this machine."""
    return torch.float32 if widens(torch.bfloat16) else torch.bfloat16


def _loops(model: LanguageModel, quick: bool) -> dict[str, Any]:
    if quick:
        return loops.run(model, at_once=2, system=16, new=8, turns=2, tokens=12, long_prompt=32)
    return loops.run(model)


def targets(parts: Mapping[str, Any]) -> dict[str, Verdict]:
    """Each target, the figure found, and whether that meets it; the bundled model is held to its speed alone."""
    bundled, large = (parts["turns"][at]["model"] for at in (0, -1))
    over_generate = f"{bundled}: {GREEDY}"
    small = targets_of(bundled, parts, over_generate=1 / 1.5, over_engine=1.05)
    wanted = (over_generate, f"{bundled}: {CHAT}")
    return {**{name: small[name] for name in wanted if name in small}, **targets_of(large, parts)}


def table(result: dict[str, Any]) -> Group:
    """The result for people."""
    shown = []
    for part in result["decode"]:
        title = f"{part['model']}, {part['dtype']}, after {part['prefix']} tokens"
        rows = Table(
            "",
            "ms a token",
            "tokens/s",
            "over generate",
            "over greedy",
            "first token cold / warm, ms",
            title=title,
            title_justify="left",
        )
        for name, row in part["rows"].items():
            star = " *" if row.get("composed") else ""
            cells = (
                f"{row['ms_per_token']:.2f}",
                f"{row['tokens_per_s']:.1f}",
                f"{row['over_generate']:.2f}",
                f"{row['over_greedy']:.3f}",
            )
            rows.add_row(name + star, *cells, _first(row))
        shown.append(rows)
    through = Table(
        "through the chat model",
        "ms a token",
        "over engine",
        "over generate",
        "first token cold / warm, ms",
        title="ChatS2T beside the bare engine",
        title_justify="left",
    )
    for part in result["chat"]:
        for name, row in part["rows"].items():
            through.add_row(
                f"{part['model']} after {part['prompt_tokens']['plain']}, {name}",
                f"{row['ms_per_token']:.2f}",
                f"{row['over_engine']:.3f}",
                f"{row['over_generate']:.2f}",
                _first(row),
            )
    at_once = Table(
        "at once",
        "one by one, tokens/s",
        "together",
        "ratio",
        "p99 gap, ms",
        "equal",
        "of the bound",
        title="generations at once",
        title_justify="left",
    )
    kinds = [("", each) for each in result["parallel"]] + [("agent loops", each) for each in result["loops"]]
    for kind, each in kinds:
        speeds = (f"{each['alone_tokens_per_s']:.1f}", f"{each['together_tokens_per_s']:.1f}", f"{each['ratio']:.2f}")
        share = f"{each['bound']['share']:.0%}" if "bound" in each else ""
        at_once.add_row(
            f"{each['model']} {each['at_once']} {kind}", *speeds, f"{each['gap_ms_p99']:.1f}", str(each["equal"]), share
        )
    wanted = Table(
        "target", "wanted", "figure", "met", title="targets (* composed from measured parts)", title_justify="left"
    )
    for name, each in result["targets"].items():
        wanted.add_row(name, each["wanted"], f"{each['figure']:.4g}", "yes" if each["met"] else "NO")
    return Group(*shown, through, at_once, wanted)


def _first(row: dict[str, Any]) -> str:
    times = [row.get(f"first_token_{kind}_ms") for kind in ("cold", "warm")]
    return " / ".join("-" if each is None else f"{each:.0f}" for each in times)
