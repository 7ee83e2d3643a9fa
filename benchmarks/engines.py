"""Engines that run one model, side by side in one run: llama.cpp bare and ours, PyTorch ours and ``generate``.

All read the same weights, from a GGUF file or from the checkpoint that it dequantises to. Rows take turns until the
time is over; medians count, and ratios are taken within each turn. Prompts differ from each other and are read before:
``tokens_per_s`` are those of all sequences together, from the first token to the last. No answer ends by itself.

llama.cpp                the binding's low-level calls, greedy, no hidden states
ours, llama.cpp          ``Engine.steps``, each sequence in a thread; with a head selector at 1% and 10% of the tokens
ours, chat               ``ChatS2T.invoke`` on it; with a tool bound, called, so that the grammar masks every token
ours, torch              ``Engine.steps`` on the checkpoint
generate                 ``transformers`` on the same weights
"""

from __future__ import annotations

import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from s2t_agents.atomic_write import write_whole
from s2t_agents.engine.engine import Engine
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.selectors.head import HeadSelector
from s2t_agents.types import Sampling

from . import turns
from .bare_llama import BareLlama
from .decode import MS, K, at_rate
from .shapes import random_prompt
from .timed_chat import TimedChat

BARE, OURS = "llama.cpp", "ours, llama.cpp"
CHAT, TOOL = "ours, chat", "ours, chat, tool called"
HEADS = {0.01: "ours, llama.cpp, head at 1%", 0.1: "ours, llama.cpp, head at 10%"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

TARGETS = {OURS: 0.95, CHAT: 0.9, TOOL: 0.9}
"""Tokens/s of one sequence beside bare llama.cpp's, at least."""

Answer = Callable[[], list[list[float]]]
"""Answers to all prompts at once: when each token came, by sequence."""


def run(
    gguf: Path,
    checkpoint: Path,
    *,
    prompts: Sequence[int] = (128, 1024),
    at_once: Sequence[int] = (1, 4, 8),
    seconds: float = 240.0,
    quick: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """All of it.

    Args:
        gguf: the model's file.
        checkpoint: the same weights for PyTorch.
        prompts: their lengths.
        at_once: numbers of sequences.
        seconds: after which no further turn begins; every row has at least two.
        quick: few tokens and short prompts: shows that it runs, measures nothing.
        say: told what is measured next.

    Returns:
        ``{"rows": {prompt: {at once: {row: {"tokens_per_s", "over_bare"}}}}, "first_token_ms", "turn_ten",
        "memory_mb", ...}``.
    """
    started = time.perf_counter()
    if quick:
        prompts, at_once, seconds = (24, 40), (1, 2), 0.0
    models = Models.load(gguf, checkpoint)
    parts: dict[str, Any] = {}
    firsts: dict[str, Any] = {}
    each = seconds / max(1, len(prompts))
    for number, length in enumerate(prompts):
        say(f"prompts of {length} tokens")
        firsts[str(length)], parts[str(length)] = _part(
            models, length, at_once, until=started + (number + 1) * each, quick=quick
        )
    say("turn ten")
    found = _turns(models, quick)
    say("memory")
    return {
        "bench": "engines",
        "model": gguf.name,
        "quantization": models.gguf.quantization,
        "rows": parts,
        "first_token_ms": firsts,
        "turn_ten": found,
        "memory_mb": memory(gguf, checkpoint, quick=quick),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "seconds": time.perf_counter() - started,
    }


class Models:
    """The model in all the engines that measure it.

    Args:
        file: of the GGUF model.
        gguf: it, on our backend.
        torch: the checkpoint on our backend, by the name of its dtype.
    """

    def __init__(self, file: Path, gguf: LanguageModel, torch: dict[str, LanguageModel]) -> None:
        self.file, self.gguf, self.torch = file, gguf, torch
        self.head = HeadSelector(gguf).eval()  # what it says costs the same as after training

    @classmethod
    def load(cls, file: Path, checkpoint: Path) -> Models:
        """Read all of them; none ends an answer by itself."""
        gguf = LanguageModel.load(str(file), n_threads=torch.get_num_threads())
        loaded = {name: LanguageModel.load(str(checkpoint), dtype=dtype) for name, dtype in DTYPES.items()}
        for model in (gguf, *loaded.values()):
            endless(model)
        return cls(file, gguf, loaded)


def endless(model: LanguageModel) -> None:
    """No token ends an answer but one that a model hardly says: a grammar needs an end."""
    model.backend.eos_ids = frozenset({max(model.tokenizer.all_special_ids)})
    if model.library == "torch":
        model.model.generation_config.eos_token_id = None


def _part(
    models: Models, length: int, at_once: Sequence[int], *, until: float, quick: bool
) -> tuple[dict[str, float], dict[str, Any]]:
    """Prompts of one length: ms to the first token of one that nobody has read, and the rows by number of sequences."""
    found: dict[str, Any] = {}
    most = max(at_once)
    prompts = [random_prompt(models.gguf, length, seed) for seed in range(most)]
    tokens = {n: 4 if quick else 128 // (n + 3) for n in at_once}
    threads = torch.get_num_threads()
    bare = BareLlama(models.file, sequences=most, cells=length + 64, threads=threads)
    try:
        first = {BARE: bare.read(prompts[:1]) * MS}
        rows = {n: _rows(models, bare, prompts[:n], tokens[n], length) for n in at_once}
        for name, answer in (one := rows[min(at_once)]).items():
            if name not in (BARE, *HEADS.values()):
                first[name] = _first(answer)
        for n in at_once:
            for name, answer in rows[n].items():  # reads what is not read yet
                if rows[n] is not one or name in first:
                    answer()
        speeds: dict[int, dict[str, list[float]]] = {n: {name: [] for name in rows[n]} for n in at_once}
        turn = 0
        while turn < (1 if quick else 2) or time.perf_counter() < until:
            for n in at_once:
                for name, answer in rows[n].items():
                    speeds[n][name].append(rate(answer()))
            turn += 1
    finally:
        bare.close()
        for model in (models.gguf, *models.torch.values()):
            model.prefix_cache.clear()
    for n, by_name in speeds.items():
        found[str(n)] = {name: _row(own, by_name[BARE]) for name, own in by_name.items()}
    return first, {"turns": turn, "tokens": {str(n): count for n, count in tokens.items()}, "at_once": found}


def rate(stamps: Sequence[Sequence[float]]) -> float:
    """Tokens per second of all sequences together, from the first token to the last."""
    count = sum(len(each) - 1 for each in stamps)
    return count / (max(each[-1] for each in stamps) - min(each[0] for each in stamps))


def _row(speeds: Sequence[float], bare: Sequence[float]) -> dict[str, float]:
    return {
        "tokens_per_s": statistics.median(speeds),
        "over_bare": statistics.median(ours / theirs for ours, theirs in zip(speeds, bare, strict=True)),
    }


def _first(answer: Answer) -> float:
    started = time.perf_counter()
    return (min(stamps[0] for stamps in answer()) - started) * MS


def _rows(models: Models, bare: BareLlama, prompts: list[list[int]], tokens: int, length: int) -> dict[str, Answer]:
    """Every row at so many sequences. A row's first call reads its prompts.

    One sequence in llama.cpp writes three times as many tokens: enough for a selection at 1% of them.
    """
    n, scope, single = len(prompts), uuid4().hex, tokens * 3 + 8 if len(prompts) == 1 else tokens

    def bare_answer() -> list[list[float]]:
        if bare.prompts != prompts:
            bare.read(prompts)
        return bare.run(single)

    def engine_answer(engine: Engine, count: int = single) -> Answer:
        def one(prompt: list[int]) -> list[float]:
            steps = engine.steps(prompt, Sampling(max_tokens=count), cache_scope=scope)
            return [time.perf_counter() for _ in steps]

        return lambda: _together(one, prompts)

    chat = TimedChat(models.gguf, single)
    texts = [chat.conversation(8, max(1, length - 24)) for _ in prompts]

    def chat_answer(tools: str | None) -> Answer:
        def one(number: int) -> list[float]:
            return chat.answer(texts[number], scope=f"{scope}/{tools}/{number}", tools=tools)[2]

        return lambda: _together(one, range(n))

    plain = Engine(models.gguf, k=K)
    rows: dict[str, Answer] = {BARE: bare_answer, OURS: engine_answer(plain)}
    if n == 1:
        for share, name in HEADS.items():
            rows[name] = engine_answer(Engine(models.gguf, k=K, trigger=at_rate(share), selector=models.head))
    rows |= {CHAT: chat_answer(None), TOOL: chat_answer("any")}
    for name, model in models.torch.items():
        rows[f"ours, torch {name}"] = engine_answer(Engine(model, k=K), tokens)
        rows[f"generate {name}"] = _generate(model, prompts, tokens)
    return rows


def _together(one: Callable[[Any], list[float]], each: Sequence[Any]) -> list[list[float]]:
    if len(each) == 1:
        return [one(each[0])]
    with ThreadPoolExecutor(len(each)) as pool:
        return list(pool.map(one, each))


def _generate(model: LanguageModel, prompts: list[list[int]], tokens: int) -> Answer:
    """``generate`` on all prompts in a batch, behind KV that the first call leaves."""
    kept = DynamicCache()
    ids = torch.tensor(prompts)

    @torch.inference_mode()
    def answer() -> list[list[float]]:
        if not kept.get_seq_length():
            model.model(input_ids=ids[:, :-1], past_key_values=kept, use_cache=True, logits_to_keep=1)
        watch = Watch()
        model.model.generate(
            ids,
            past_key_values=copy.deepcopy(kept),
            do_sample=False,
            max_new_tokens=tokens,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([watch]),
        )
        return [watch.stamps] * len(prompts)

    return answer


class Watch(StoppingCriteria):  # type: ignore[misc]
    """Notes when each token came, and stops nothing."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """A token of every row has come."""
        self.stamps.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def _turns(models: Models, quick: bool) -> dict[str, dict[str, float]]:
    """ms to the first token of turn ten, and of reading its new tokens alone, on both of our backends."""
    found = {}
    for name, model in {OURS: models.gguf, "ours, torch fp32": models.torch["fp32"]}.items():
        each = turns.run(model, system=16, new=8, turns=3, repeats=1) if quick else turns.run(model, repeats=5)
        found[name] = {**each["first_token_ms"], "over_new_alone": each["kept_over_new_alone"]}
    return found


def memory(gguf: Path, checkpoint: Path, *, quick: bool = False) -> dict[str, float]:
    """Peak resident memory in MB of a process of its own that reads a prompt and answers, by engine."""
    length, found = 24 if quick else 1024, {}
    for name, path in ((BARE, gguf), (OURS, gguf), ("ours, torch fp32", checkpoint), ("ours, torch bf16", checkpoint)):
        command = [sys.executable, "-m", "benchmarks.engines_memory", name, str(path), str(length)]
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
        found[name] = float(json.loads(done.stdout.splitlines()[-1]))
    return found


def table(result: dict[str, Any]) -> Group:
    """The result for people."""
    shown = []
    for length, part in result["rows"].items():
        speeds = Table(
            "tokens/s",
            *(f"{n} at once" for n in part["at_once"]),
            "first token, ms",
            title=f"{result['model']}, prompts of {length} tokens (beside bare llama.cpp)",
            title_justify="left",
        )
        for name in names_of(part):
            cells = [row.get(name) for row in part["at_once"].values()]
            first = result["first_token_ms"][length].get(name)
            speeds.add_row(
                name,
                *("" if each is None else f"{each['tokens_per_s']:.1f} ({each['over_bare']:.2f})" for each in cells),
                "" if first is None else f"{first:.0f}",
            )
        shown.append(speeds)
    more = Table("", "first token of turn 10, ms", "new tokens alone, ms", "peak memory, MB")
    for name, megabytes in result["memory_mb"].items():
        turn = result["turn_ten"].get(name)
        ms = ("", "") if turn is None else (f"{turn['kept']:.0f}", f"{turn['new_alone']:.0f}")
        more.add_row(name, *ms, f"{megabytes:.0f}")
    return Group(*shown, more)


def joined(result: dict[str, Any], file: Path) -> dict[str, Any]:
    """A result, and of a stored one the prompts that it has not; written there."""
    if file.exists():
        stored = json.loads(file.read_text(encoding="utf-8"))
        for name in ("rows", "first_token_ms"):
            result[name] = dict(sorted({**stored[name], **result[name]}.items(), key=lambda each: int(each[0])))
    write_whole(file, (json.dumps(result, indent=1) + "\n").encode())
    return result


def names_of(part: dict[str, Any]) -> list[str]:
    """The rows of a part, in their order."""
    return list(dict.fromkeys(name for rows in part["at_once"].values() for name in rows))
