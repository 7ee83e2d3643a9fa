"""All that is to be measured on a GPU, within eight minutes: first whether it is right, then how fast it is.

Every part has a time of its own and is cut off after it; what it had found by then is kept, and written to a file after
each finding where one is named. ``s2t bench gpu --device cpu --shape tiny`` runs the same code in seconds and measures
nothing.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from s2t_agents.errors import ConfigError

from . import agreement, decode, growth, loops, parallel, turns
from .device import described, share_of_limit
from .shapes import SHAPES, measured_model


@dataclass(frozen=True)
class Sizes:
    """How much is measured: prefixes, tokens made and repeats, generations and agents at once, Ks, turns, MB copied."""

    prefixes: tuple[int, ...] = (128, 1024, 4096)
    tokens: int = 101
    repeats: int = 3
    at_once: tuple[int, ...] = (1, 4, 8, 16)
    agents: int = 8
    ks: tuple[int, ...] = growth.KS
    turns: int = 10
    copied_mb: int = 1024


FULL = Sizes()
TINY = Sizes(prefixes=(16, 32), tokens=6, repeats=1, at_once=(2,), agents=2, ks=(1, 8), turns=3, copied_mb=8)

BUDGET_S = {
    "correctness": 60,
    "decode": 220,
    "parallel": 70,
    "loops": 40,
    "growth": 50,
    "turns": 40,
}
"""Seconds for each part: 480 in all."""


class OutOfTime(BaseException):
    """A part's time is over. No ``Exception``: nobody on the way may take it for a failure of a step."""


def run(
    device: str = "cuda",
    shape: str = "qwen2.5-1.5b",
    *,
    say: Callable[[str], None] = lambda _: None,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Everything, part by part.

    Args:
        device: ``cuda``, ``cuda:1``, ... or ``cpu``.
        shape: a key of ``shapes.SHAPES``; random weights, bf16.
        say: told what comes next.
        keep: given all that was found so far, after each finding.

    Returns:
        The device, the parts with their budgets, and the share of the memory's speed that a token reaches.

    Raises:
        ConfigError: no such device or shape.
    """
    where = checked(device, shape)
    torch.set_float32_matmul_precision("highest")
    sizes = TINY if shape == "tiny" else FULL
    about = described(where, sizes.copied_mb)
    result: dict[str, Any] = {
        "bench": "gpu",
        "shape": shape,
        **about,
        "transformers": transformers.__version__,
        "parts": {},
    }

    def part(name: str, findings: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
        say(name)
        made: dict[str, Any] = {"budget_s": BUDGET_S[name], "found": [], "finished": False}
        result["parts"][name] = made
        measure(made, findings, lambda: keep(result))
        found: list[dict[str, Any]] = made["found"]
        return found

    part("correctness", (agreement.run(name, where) for name in agreement.models()))
    model = measured_model(shape, dtype=torch.bfloat16, device=device)
    agreement.with_kv_pools(model)
    runs = (decode.run(model, prefix=n, tokens=sizes.tokens, repeats=sizes.repeats) for n in sizes.prefixes)
    for found in part("decode", runs):
        engine = found["rows"]["engine"]["ms_per_token"]
        result.setdefault("memory_limit", {})[str(found["prefix"])] = share_of_limit(model, engine, about)
    part("parallel", (parallel.run(model, at_once=n, tokens=max(8, sizes.tokens // 3)) for n in sizes.at_once))
    part("loops", (loops.run(model, at_once=n, tokens=sizes.tokens // 2) for n in (sizes.agents,)))
    part("growth", (growth.run(model, prefixes=(n,), ks=sizes.ks, steps=sizes.tokens // 2) for n in sizes.prefixes))
    part("turns", (turns.run(model, turns=sizes.turns, repeats=each) for each in (sizes.repeats,)))
    result["graphs"] = (
        model.torch_backend.runner.graph_runner is not None and not model.torch_backend.runner.graph_runner.failed
    )
    result["correct"] = _correct(result["parts"]["correctness"])
    keep(result)
    return result


def checked(device: str, shape: str) -> torch.device:
    """The device, if it is there.

    Raises:
        ConfigError: no such device or shape.
    """
    if shape not in SHAPES:
        raise ConfigError(f"--shape is {shape!r}, which is none of {', '.join(SHAPES)}.")
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"--device is {device!r}, which names no device.", hint="Give cuda, cuda:1 or cpu."
        ) from error
    if where.type not in ("cuda", "cpu"):
        raise ConfigError(
            f"--device is {device!r}; this bench measures CUDA devices.", hint="Give cuda, cuda:1 or cpu."
        )
    count = torch.cuda.device_count()
    if where.type == "cuda" and (where.index or 0) >= count:
        raise ConfigError(
            f"--device is {device!r}, and {count} CUDA devices are here.",
            hint="Run it on a machine with a GPU; --device cpu --shape tiny shows that it runs.",
        )
    return where


def measure(part: dict[str, Any], findings: Iterator[dict[str, Any]], keep: Callable[[], None]) -> None:
    """Fill one part with what is found within its time. An error ends the part, not the bench.

    Args:
        part: has ``budget_s`` and an empty list ``found``; told if it ``finished``, else why not, and its ``seconds``.
        findings: made one after another.
        keep: called after each, and at the end.
    """
    started = time.perf_counter()
    try:
        with at_most(part["budget_s"]):
            for found in findings:
                part["found"].append(found)
                keep()
        part["finished"] = True
    except OutOfTime:
        part["cut_off"] = True
    except Exception as error:  # noqa: BLE001 - the other parts are wanted all the same
        part["error"] = f"{type(error).__name__}: {error}"
    part["seconds"] = time.perf_counter() - started
    keep()


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise ``OutOfTime`` inside the block after so long; where there are no timers, it may take as long as it does."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _correct(part: dict[str, Any]) -> bool:
    """Whether all models were compared and agree."""
    return part["finished"] and all(found["passed"] for found in part["found"])


def lines(result: dict[str, Any]) -> Iterator[str]:
    """The result for people."""
    yield f"{result['device']}, torch {result['torch']}, copies at {result['copy_gb_s']:.0f} GB/s"
    yield f"right: {result['correct']}; graphs: {result['graphs']}"
    for name, part in result["parts"].items():
        state = "finished" if part["finished"] else part.get("error", "cut off")
        yield f"{name}: {state} after {part['seconds']:.0f} of {part['budget_s']} s"
    for found in result["parts"]["decode"]["found"]:
        rows = found["rows"]
        told = ", ".join(f"{name} {row['ms_per_token']:.2f}" for name, row in rows.items())
        yield f"ms a token after {found['prefix']}: {told}"
    for prefix, limit in result.get("memory_limit", {}).items():
        yield f"share of the memory's speed after {prefix}: {limit['share_of_copy']:.0%} of a copy's"
    for kind in ("parallel", "loops"):
        for found in result["parts"][kind]["found"]:
            speed = f"{found['together_tokens_per_s']:.0f} tokens/s, {found['ratio']:.2f} times one by one"
            yield f"{kind}, {found['at_once']} at once: {speed}"
