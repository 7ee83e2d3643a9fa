"""Greedy tokens/s of several sequences at once: a server of OpenAI's completions API, as vLLM's, beside this engine.

Both run the same checkpoint in the same precision on the same machine, and take turns. The server is started by whoever
measures, and is idle while the engine computes. ``MODEL=folder examples/vllm/speed.sh`` does both with vLLM; beside any
other server::

    s2t bench served http://127.0.0.1:8000/v1 --checkpoint CHECKPOINT --dtype bfloat16
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import torch
from rich.table import Table

from s2t_agents.engine.engine import Engine
from s2t_agents.errors import ConfigError
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.types import Sampling

from .shapes import precision_of, random_prompt

TIMEOUT_S = 120.0

PAUSE_S = 1.0
"""Between two turns: OpenMP threads wait busily for a while after their last work, beside whoever comes next."""
TRIES = 5
"""To have all sequences go on together."""

Answers = Callable[[int], list[list[float]]]
"""Answers to so many prompts at once: when each token came, by sequence."""


def run(
    url: str,
    checkpoint: str,
    *,
    dtype: str = "bfloat16",
    at_once: Sequence[int] = (1, 4, 8),
    prompt: int = 128,
    tokens: int = 64,
    repeats: int = 5,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Both, for each number of sequences.

    Args:
        url: of the server's API, on this machine.
        checkpoint: what it serves.
        dtype: of the weights, in both.
        at_once: numbers of sequences.
        prompt: tokens of each prompt; no two are alike, and all are read before they are measured.
        tokens: of each answer, at least 2.
        repeats: turns; the median counts.
        say: told what is measured next.

    Returns:
        ``{"rows": {at once: {"server", "ours", "over_server"}}, ...}``: tokens/s of all sequences together, from the
        first token to the last; ratios are medians of those within each turn.

    Raises:
        ConfigError: the server does not answer.
    """
    model = LanguageModel.load(checkpoint, dtype=getattr(torch, dtype), device="cpu")
    model.backend.eos_ids = frozenset()
    prompts = [random_prompt(model, prompt, seed) for seed in range(max(at_once))]
    server = Server(url, prompts, tokens)
    ways: dict[str, Answers] = {"server": server.answers, "ours": _ours(model, prompts, tokens)}
    rows: dict[str, Any] = {}
    for count in at_once:
        say(f"{count} at once")
        for answers in ways.values():
            answers(count)  # reads the prompts
        speeds = [{name: _after_a_pause(answers, count) for name, answers in ways.items()} for _ in range(repeats)]
        rows[str(count)] = {
            **{name: statistics.median(each[name] for each in speeds) for name in ways},
            "over_server": statistics.median(each["ours"] / each["server"] for each in speeds),
        }
    return {
        "bench": "served",
        "model": Path(checkpoint).name,
        "server": server.name,
        "precision": precision_of(model),
        "prompt": prompt,
        "tokens": tokens,
        "repeats": repeats,
        "rows": rows,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


class Server:
    """A server that streams completions.

    Args:
        url: of its API.
        prompts: token ids.
        tokens: of each answer.

    Attributes:
        name: of the model that it serves.
    """

    def __init__(self, url: str, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        self._client = httpx.Client(timeout=TIMEOUT_S)
        self._url, self._prompts, self._tokens = url.rstrip("/"), prompts, tokens
        try:
            listed = self._client.get(f"{self._url}/models").raise_for_status().json()
        except (httpx.HTTPError, ValueError) as error:
            raise ConfigError(f"{url} does not list its models: {error}.", hint="Start the server first.") from error
        self.name: str = listed["data"][0]["id"]

    def answers(self, count: int) -> list[list[float]]:
        """See ``Answers``."""
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(self._answer, self._prompts[:count]))

    def _answer(self, prompt: Sequence[int]) -> list[float]:
        body = {
            "model": self.name,
            "prompt": list(prompt),
            "max_tokens": self._tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        stamps: list[float] = []
        with self._client.stream("POST", f"{self._url}/completions", json=body) as reply:
            reply.raise_for_status()
            for line in reply.iter_lines():
                event = json.loads(line[6:]) if line.startswith("data: {") else {}
                if event.get("choices"):
                    usage = event.get("usage") or {"completion_tokens": len(stamps) + 1}
                    stamps += [time.perf_counter()] * (usage["completion_tokens"] - len(stamps))
        return stamps[: self._tokens]


def _ours(model: LanguageModel, prompts: Sequence[Sequence[int]], tokens: int) -> Answers:
    engine, scope = Engine(model), uuid4().hex

    def answer(prompt: Sequence[int]) -> list[float]:
        return [time.perf_counter() for _ in engine.steps(prompt, Sampling(max_tokens=tokens), cache_scope=scope)]

    def answers(count: int) -> list[list[float]]:
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(answer, prompts[:count]))

    return answers


def _after_a_pause(answers: Answers, count: int) -> float:
    """Tokens/s, measured after ``PAUSE_S``; again where one sequence had ended before another began.

    Raises:
        ConfigError: they never went on together.
    """
    for _ in range(TRIES):
        time.sleep(PAUSE_S)
        if (speed := tokens_per_s(answers(count))) is not None:
            return speed
    raise ConfigError(f"{count} sequences never went on together in {TRIES} tries.", hint="Ask for more tokens.")


def tokens_per_s(answers: Sequence[Sequence[float]]) -> float | None:
    """Of all sequences together, from the last first token to the first last one: while all of them go on, if ever."""
    start, end = max(stamps[0] for stamps in answers), min(stamps[-1] for stamps in answers)
    if end <= start:
        return None
    return sum(start < stamp <= end for stamps in answers for stamp in stamps) / (end - start)


def table(result: dict[str, Any]) -> Table:
    """The result for people."""
    title = f"{result['model']}, {result['precision']}, tokens/s after {result['prompt']} tokens"
    shown = Table("at once", "server", "ours", "ours over server", title=title, title_justify="left")
    for count, row in result["rows"].items():
        shown.add_row(count, f"{row['server']:.0f}", f"{row['ours']:.0f}", f"{row['over_server']:.2f}")
    return shown


def markdown(result: dict[str, Any], made: dict[str, Any]) -> str:
    """The result for docs/performance.md."""
    lines = ["| sequences at once | server, tokens/s | ours | ours over server |", "|---|---|---|---|"]
    for count, row in result["rows"].items():
        lines.append(f"| {count} | {row['server']:.0f} | {row['ours']:.0f} | {row['over_server']:.2f} |")
    note = (
        f"{result['model']}, {result['precision']}, prompts of {result['prompt']} tokens, {result['tokens']} greedy "
        f"tokens each; medians of {result['repeats']} turns. {made['hardware']}, torch {result['torch']}, commit "
        f"{made['commit']}, {made['date']}. Made by `s2t bench served` beside vLLM on the CPU."
    )
    return "\n".join([*lines, "", note])
