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
from functools import partial
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

FITS = 2048
"""Tokens of all prompts together up to which the chat model is measured."""

Answer = Callable[[], list[list[float]]]
"""Answers to all prompts at once: when each token came, by sequence."""


def run(
    gguf: Path,
    checkpoint: Path,
    *,
    prompts: Sequence[int] = (128, 1024),
    at_once: Sequence[int] = (1, 4, 8),
    seconds: float = 240.0,
    rows_only: bool = False,
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
        rows_only: neither turn ten nor memory.
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
    more: dict[str, Any] = {}
    if not rows_only:
        say("turn ten")
        more["turn_ten"] = _turns(models, quick)
        say("memory")
        more["memory_mb"] = memory(gguf, checkpoint, quick=quick)
    return {
        "bench": "engines",
        "model": gguf.name,
        "quantization": models.gguf.quantization,
        "rows": parts,
        "first_token_ms": firsts,
        **more,
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
    prompts = [random_prompt(models.gguf, length, seed) for seed in range(max(at_once))]
    threads = torch.get_num_threads()
    bare = BareLlama(models.file, sequences=len(prompts), cells=length + 128, threads=threads)
    try:
        firsts = {BARE: bare.read(prompts[:1]) * MS}
        bare.read(prompts)
        make = Rows(models, bare, prompts, length)
        rows = {n: make.rows(n, 4 if quick else 128 // (n + 3)) for n in sorted(at_once)}
        for n, by_name in rows.items():  # reads what is not read yet
            for name, answer in by_name.items():
                started = time.perf_counter()
                first = min(stamps[0] for stamps in answer())
                if n == 1 and name not in (BARE, *HEADS.values()):
                    firsts[name] = (first - started) * MS
        speeds: dict[int, dict[str, list[float]]] = {n: {name: [] for name in rows[n]} for n in rows}
        turns_done = 0
        while turns_done < (1 if quick else 2) or time.perf_counter() < until:
            for n, by_name in rows.items():
                for name, answer in by_name.items():
                    speeds[n][name].append(rate(answer()))
            turns_done += 1
    finally:
        bare.close()
        for model in (models.gguf, *models.torch.values()):
            model.prefix_cache.clear()
    found = {str(n): {name: _row(own, by_name[BARE]) for name, own in by_name.items()} for n, by_name in speeds.items()}
    return firsts, {"turns": turns_done, "at_once": found}


def rate(stamps: Sequence[Sequence[float]]) -> float:
    """Tokens per second of all sequences together, from the first token to the last."""
    count = sum(len(each) - 1 for each in stamps)
    return count / (max(each[-1] for each in stamps) - min(each[0] for each in stamps))


def _row(speeds: Sequence[float], bare: Sequence[float]) -> dict[str, float]:
    return {
        "tokens_per_s": statistics.median(speeds),
        "over_bare": statistics.median(ours / theirs for ours, theirs in zip(speeds, bare, strict=True)),
    }


class Rows:
    """Rows over some prompts. The first answer of a row reads those that it has not read.

    Args:
        models: in all engines.
        bare: that has read the prompts.
        prompts: token ids.
        length: of each.
    """

    def __init__(self, models: Models, bare: BareLlama, prompts: list[list[int]], length: int) -> None:
        self._models, self._bare, self._prompts, self._length = models, bare, prompts, length
        self._scope = uuid4().hex
        self._generate = {name: Generating(model, prompts) for name, model in models.torch.items()}

    def rows(self, n: int, tokens: int) -> dict[str, Answer]:
        """Every row at ``n`` sequences of so many tokens.

        One sequence in llama.cpp writes three times as many: enough for a selection at 1% of them. The chat model is
        left out where its prompts would not fit beside the engine's into the prefix cache.
        """
        gguf, long = self._models.gguf, tokens * 3 + 8 if n == 1 else tokens
        rows: dict[str, Answer] = {
            BARE: lambda: self._bare.run(n, long),
            OURS: self._engine(Engine(gguf, k=K), n, long),
        }
        if n == 1:
            for share, name in HEADS.items():
                engine = Engine(gguf, k=K, trigger=at_rate(share), selector=self._models.head)
                rows[name] = self._engine(engine, n, long)
        if n * self._length <= FITS:
            rows |= {CHAT: self._chat(n, long, None), TOOL: self._chat(n, long, "any")}
        for name, model in self._models.torch.items():
            rows[f"ours, torch {name}"] = self._engine(Engine(model, k=K), n, tokens)
            rows[f"generate {name}"] = partial(self._generate[name], n, tokens)
        return rows

    def _engine(self, engine: Engine, n: int, tokens: int) -> Answer:
        def one(prompt: list[int]) -> list[float]:
            steps = engine.steps(prompt, Sampling(max_tokens=tokens), cache_scope=self._scope)
            return [time.perf_counter() for _ in steps]

        return lambda: _together(one, self._prompts[:n])

    def _chat(self, n: int, tokens: int, tools: str | None) -> Answer:
        chat = TimedChat(self._models.gguf, tokens)
        messages = chat.conversation(8, max(1, self._length - 24))

        def one(number: int) -> list[float]:
            return chat.answer(messages, scope=f"{self._scope}/{tools}/{number}", tools=tools)[2]

        return lambda: _together(one, range(n))


def _together(one: Callable[[Any], list[float]], each: Sequence[Any]) -> list[list[float]]:
    if len(each) == 1:
        return [one(each[0])]
    with ThreadPoolExecutor(len(each)) as pool:
        return list(pool.map(one, each))


class Generating:
    """``generate`` on some prompts in a batch; the KV of all is read once.

    Args:
        model: whose ``generate`` is called.
        prompts: of one length.
    """

    def __init__(self, model: LanguageModel, prompts: list[list[int]]) -> None:
        self._model, self._ids, self._kept = model.model, torch.tensor(prompts), DynamicCache()

    @torch.inference_mode()
    def __call__(self, n: int, tokens: int) -> list[list[float]]:
        """Answers to the first ``n`` prompts; one prompt that nobody has read is read on the way."""
        watch, past = Watch(), None
        read = self._kept.get_seq_length() > 0
        if n > 1 and not read:
            self._model(input_ids=self._ids[:, :-1], past_key_values=self._kept, use_cache=True, logits_to_keep=1)
            read = True
        if read:
            past = copy.deepcopy(self._kept)
            past.batch_select_indices(torch.arange(n))
        self._model.generate(
            self._ids[:n],
            past_key_values=past,
            do_sample=False,
            max_new_tokens=tokens,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([watch]),
        )
        return [watch.stamps] * n


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
    for name, megabytes in result.get("memory_mb", {}).items():
        turn = result["turn_ten"].get(name)
        ms = ("", "") if turn is None else (f"{turn['kept']:.0f}", f"{turn['new_alone']:.0f}")
        more.add_row(name, *ms, f"{megabytes:.0f}")
    return Group(*shown, more)


def joined(result: dict[str, Any], file: Path) -> dict[str, Any]:
    """A result, and of a stored one what it has not; written there."""
    if file.exists():
        stored = json.loads(file.read_text(encoding="utf-8"))
        result = {**stored, **result}
        for name in ("rows", "first_token_ms"):
            result[name] = dict(sorted({**stored[name], **result[name]}.items(), key=lambda each: int(each[0])))
    write_whole(file, (json.dumps(result, indent=1) + "\n").encode())
    return result


def markdown(report: dict[str, Any], made: dict[str, Any]) -> str:
    """The tables for the documentation, with where and when they were made."""
    lines: list[str] = []
    for length, part in report["rows"].items():
        heads = [f"prompts of {int(length):,} tokens", *(f"{n} at once" for n in part["at_once"]), "first token, ms"]
        lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for name in names_of(part):
            cells = [rows.get(name) for rows in part["at_once"].values()]
            told = ["" if each is None else f"{each['tokens_per_s']:.0f} ({each['over_bare']:.2f})" for each in cells]
            first = report["first_token_ms"][length].get(name)
            lines.append(f"| {name} | {' | '.join([*told, '' if first is None else f'{first:.0f}'])} |")
        lines.append("")
    heads = ["", "first token of turn 10, ms", "its new tokens alone", "peak memory, MB"]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, megabytes in report["memory_mb"].items():
        turn = report["turn_ten"].get(name)
        ms = (
            ("", "")
            if turn is None
            else (f"{turn['kept']:.0f} ({turn['over_new_alone']:.2f})", f"{turn['new_alone']:.0f}")
        )
        lines.append(f"| {name} | {' | '.join(ms)} | {megabytes:.0f} |")
    turns_done = " and ".join(str(part["turns"]) for part in report["rows"].values())
    what = (
        f"Tokens/s of all sequences together after their prompts are read, in brackets beside bare llama.cpp in the "
        f"same turn; medians of {turns_done} turns. {report['model']} ({report['quantization']}), and the checkpoint "
        f"that it dequantises to; {report['threads']} threads. {made['hardware']}, commit {made['commit']}, "
        f"{made['date']}. Made by `{made['command']}`."
    )
    return "\n".join([*lines, "", what])


def names_of(part: dict[str, Any]) -> list[str]:
    """The rows of a part, in their order."""
    return list(dict.fromkeys(name for rows in part["at_once"].values() for name in rows))
