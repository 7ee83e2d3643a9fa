"""Engines that run one model, side by side in one run: llama.cpp bare and ours, PyTorch ours and ``generate``.

All read the same weights, from a GGUF file or from the checkpoint that it dequantises to. Rows take turns until the
time is over; medians count, and ratios are taken within each turn. Prompts differ from each other and are read before:
``tokens_per_s`` are those of all sequences together, from the first token to the last. No answer ends by itself.

llama.cpp                the binding's low-level calls, greedy, no hidden states
llama.cpp's server       that of the binding, over HTTP, one request at a time; where its packages are
ours, llama.cpp          ``Engine.steps``, each sequence in a thread; with a head selector at 1% and 10% of the tokens
ours, chat               ``ChatS2T.invoke`` on it; with a tool called under its grammar: what it forces counts, too
ours, torch              ``Engine.steps`` on the checkpoint
generate                 ``transformers`` on the same weights
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from operator import truediv
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from s2t_agents.atomic_write import write_whole
from s2t_agents.engine.engine import Engine
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.selectors.head import HeadSelector
from s2t_agents.types import Sampling

from . import turns
from .bare_llama import BareLlama
from .decode import MS, Generate, K, at_rate
from .llama_server import LlamaServer, available
from .shapes import random_prompt
from .timed_chat import TimedChat

BARE, SERVER, OURS = "llama.cpp", "llama.cpp's server", "ours, llama.cpp"
CHAT, TOOL = "ours, chat", "ours, chat, tool called"
HEADS = {0.01: "ours, llama.cpp, head at 1%", 0.1: "ours, llama.cpp, head at 10%"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

TARGETS = {OURS: 0.95, CHAT: 0.9, TOOL: 0.9}
"""Tokens/s of one sequence beside bare llama.cpp's, at least."""

FITS = 4096
"""Tokens of all prompts together up to which the chat model is measured."""

MOST = 8192
"""Tokens of all prompts together up to which a number of sequences is measured."""

Answer = Callable[[], list[list[float]]]
"""Answers to all prompts at once: when each token came, by sequence."""


def run(
    gguf: Path,
    checkpoint: Path,
    *,
    prompts: Sequence[int] = (128, 1024),
    at_once: Sequence[int] = (1, 4, 8),
    seconds: float = 240.0,
    most: int = MOST,
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
        seconds: after which no further row begins; every row has at least one.
        most: tokens of all prompts together, beyond which a number of sequences is left out; one never is.
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
            models,
            length,
            [n for n in at_once if n == 1 or n * length <= most],
            until=started + (number + 1) * each,
            quick=quick,
            say=say,
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


def _server(models: Models, cells: int, threads: int) -> LlamaServer:
    tokenizer = models.gguf.tokenizer
    return LlamaServer(models.file, cells=cells, threads=threads, banned=tokenizer.all_special_ids)


def _part(
    models: Models, length: int, at_once: Sequence[int], *, until: float, quick: bool, say: Callable[[str], None]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Prompts of one length: ms to the first token of one that nobody has read, and the rows by number of sequences."""
    prompts = [random_prompt(models.gguf, length, seed) for seed in range(max(at_once))]
    threads = torch.get_num_threads()
    bare = BareLlama(models.file, sequences=len(prompts), cells=length + 128, threads=threads)
    server = _server(models, length + 256, threads) if available() else None
    try:
        firsts = {BARE: bare.read(prompts[:1]) * MS}
        bare.read(prompts)
        make = Rows(models, bare, server, prompts, length)
        rows = {n: make.rows(n, 4 if quick else 128 // (n + 3)) for n in sorted(at_once)}
        for n, by_name in rows.items():  # reads what is not read yet
            for name, answer in by_name.items():
                started = time.perf_counter()
                first = min(stamps[0] for stamps in answer())
                say(f"  {n} at once, {name}: {time.perf_counter() - started:.1f} s")
                if n == 1 and name not in (BARE, *HEADS.values()):
                    firsts[name] = (first - started) * MS
        measured: dict[int, dict[str, Measured]] = {n: {name: Measured() for name in rows[n]} for n in rows}
        turns_done = 0
        while not turns_done or (not quick and time.perf_counter() < until):
            for n, by_name in rows.items():
                for name, answer in by_name.items():
                    if not turns_done or time.perf_counter() < until:
                        measured[n][name].add(answer, server.cpu_s if server and name == SERVER else time.process_time)
            turns_done += 1
            say(f"  {turns_done} turns, {time.perf_counter() - until:+.0f} s")
    finally:
        bare.close()
        if server:
            server.close()
        for model in (models.gguf, *models.torch.values()):
            model.prefix_cache.clear()
    found = {
        str(n): {name: own.beside(by_name[BARE]) for name, own in by_name.items()} for n, by_name in measured.items()
    }
    return firsts, {"at_once": found}


@dataclass
class Measured:
    """A row: tokens per second, and ms of CPU time a token of the whole process, one number a turn."""

    speeds: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)

    def add(self, answer: Answer, cpu_s: Callable[[], float]) -> None:
        """One turn; ``cpu_s`` tells the CPU time of the process that does the work."""
        started = cpu_s()
        stamps = answer()
        self.cpu_ms.append((cpu_s() - started) * MS / sum(map(len, stamps)))
        self.speeds.append(rate(stamps))

    def beside(self, bare: Measured) -> dict[str, float]:
        """Medians; ratios are of tokens per second, and of tokens per CPU time, within each turn."""
        return {
            "tokens_per_s": statistics.median(self.speeds),
            "over_bare": statistics.median(map(truediv, self.speeds, bare.speeds)),
            "cpu_ms": statistics.median(self.cpu_ms),
            "over_bare_cpu": statistics.median(map(truediv, bare.cpu_ms, self.cpu_ms)),
            "turns": len(self.speeds),
        }


def rate(stamps: Sequence[Sequence[float]]) -> float:
    """Tokens per second of all sequences together, from the first token to the last."""
    count = sum(len(each) - 1 for each in stamps)
    return count / (max(each[-1] for each in stamps) - min(each[0] for each in stamps))


class Rows:
    """Rows over some prompts. The first answer of a row reads those that it has not read.

    Args:
        models: in all engines.
        bare: that has read the prompts.
        server: None leaves its row out.
        prompts: token ids.
        length: of each.
    """

    def __init__(
        self, models: Models, bare: BareLlama, server: LlamaServer | None, prompts: list[list[int]], length: int
    ) -> None:
        self._models, self._bare, self._server, self._prompts, self._length = models, bare, server, prompts, length
        self._scope = uuid4().hex
        self._generate = {name: Generate(model, prompts) for name, model in models.torch.items()}

    def rows(self, n: int, tokens: int) -> dict[str, Answer]:
        """Every row at ``n`` sequences of so many tokens.

        One sequence in llama.cpp writes three times as many, enough for a selection at 1% of them; PyTorch half as
        many, being slower. The chat model is left out where its prompts would not fit beside the engine's into the
        prefix cache.
        """
        gguf, long = self._models.gguf, tokens * 3 + 8 if n == 1 else tokens
        rows: dict[str, Answer] = {
            BARE: lambda: self._bare.run(n, long),
            OURS: self._engine(Engine(gguf, k=K), n, long),
        }
        if self._server and n == 1:  # it runs one after another
            rows[SERVER] = partial(self._over_http, self._server, long)
        if n == 1:
            for share, name in HEADS.items():
                engine = Engine(gguf, k=K, trigger=at_rate(share), selector=self._models.head)
                rows[name] = self._engine(engine, n, long)
        if n * self._length <= FITS:
            rows |= {CHAT: self._chat(n, long, None), TOOL: self._chat(n, long, "any")}
        for name, model in self._models.torch.items():
            rows[f"ours, torch {name}"] = self._engine(Engine(model, k=K), n, -(-tokens // 2))
            rows[f"generate {name}"] = self._batch(name, n, -(-tokens // 2))
        return rows

    def _engine(self, engine: Engine, n: int, tokens: int) -> Answer:
        def one(prompt: list[int]) -> list[float]:
            steps = engine.steps(prompt, Sampling(max_tokens=tokens), cache_scope=self._scope)
            return [time.perf_counter() for _ in steps]

        return lambda: _together(one, self._prompts[:n])

    def _batch(self, name: str, n: int, tokens: int) -> Answer:
        return lambda: [self._generate[name](tokens, range(n))] * n

    def _over_http(self, server: LlamaServer, tokens: int) -> list[list[float]]:
        text = self._models.gguf.tokenizer.decode(self._prompts[0])
        return [server.answer(text, tokens)]

    def _chat(self, n: int, tokens: int, tools: str | None) -> Answer:
        chat = TimedChat(self._models.gguf, tokens)
        messages = chat.conversation(8, max(1, self._length - 24))

        def one(number: int) -> list[float]:
            return chat.answer(messages, scope=f"{self._scope}/{tools}/{number}", tools=tools).stamps

        return lambda: _together(one, range(n))


def _together(one: Callable[[Any], list[float]], each: Sequence[Any]) -> list[list[float]]:
    if len(each) == 1:
        return [one(each[0])]
    with ThreadPoolExecutor(len(each)) as pool:
        return list(pool.map(one, each))


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


def by_number(found: dict[str, Any]) -> dict[str, Any]:
    """In the order of the numbers that the keys are."""
    return dict(sorted(found.items(), key=lambda each: int(each[0])))


def joined(result: dict[str, Any], file: Path) -> dict[str, Any]:
    """A result, and of a stored one what it has not; written there."""
    if file.exists():
        stored = json.loads(file.read_text(encoding="utf-8"))
        for length, part in stored["rows"].items():
            mine = result["rows"].setdefault(length, {**part, "at_once": {}})
            mine["at_once"] = by_number({**part["at_once"], **mine["at_once"]})
            result["first_token_ms"][length] = {
                **stored["first_token_ms"][length],
                **result["first_token_ms"].get(length, {}),
            }
        for name in ("rows", "first_token_ms"):
            result[name] = by_number(result[name])
        result = {**stored, **result}
    write_whole(file, (json.dumps(result, indent=1) + "\n").encode())
    return result
