"""Another commit of this repository beside the working tree: time per token, first token and memory, in one run.

The commit is checked out into a temporary git worktree. Each version has a process of its own (``against_probe``), and
both measure in turns, old new new old: a machine that slows down meanwhile does so for both. Ratios are new over old,
medians of those within each turn.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.table import Table
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from s2t_agents.bundled import SLM, model_path
from s2t_agents.errors import ConfigError
from s2t_agents.testing import tiny_config

from .shapes import SHAPES, tokenizer_of
from .speed import usual_dtype

ROOT = Path(__file__).parent.parent
PROBE = Path(__file__).with_name("against_probe.py")
ROWS = ("engine", "chat", "chat, tool bound", "eight at once")
TIMES = ("ms_per_token", "first_cold_ms", "first_warm_ms")
MODELS = (SLM, "qwen2.5-0.5b")
QUICK = ("tiny",)


def run(
    commit: str,
    *,
    repeats: int = 5,
    model: str | None = None,
    quick: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Both versions on the bundled model (one thread) and the 0.5B shape (all threads).

    Args:
        commit: any name git knows it by.
        repeats: turns of each row, after one that is thrown away.
        model: one of ``MODELS``, measured alone; None takes all.
        quick: a tiny shape alone and few tokens: shows that it runs, measures nothing.
        say: told what is measured next.

    Returns:
        ``{"models": {name: {"rows": {row: {time: {"old", "new", "ratio"}}}, "memory": ...}}, "load": [before, after],
        ...}``; times in ms, load averages over one minute.

    Raises:
        ConfigError: git knows no such commit, there is no such model, or a version cannot be measured.
    """
    if model not in (None, *MODELS):
        raise ConfigError(f"--model is {model!r}, which is none of {', '.join(MODELS)}.")
    chosen = QUICK if quick else MODELS if model is None else (model,)
    load, repeats = [os.getloadavg()[0]], 1 if quick else repeats
    models: dict[str, Any] = {}
    with checkout(commit) as old:
        for name in chosen:
            say(name)
            models[name] = _measured({"old": old, "new": ROOT}, name, repeats, quick)
    load.append(os.getloadavg()[0])
    return {
        "bench": "against",
        "old": _git("rev-parse", "--short", commit),
        "new": _git("describe", "--always", "--dirty"),
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "load": load,
        "models": models,
    }


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A commit's files, in a temporary git worktree.

    Raises:
        ConfigError: git knows no such commit.
    """
    with TemporaryDirectory(prefix=f"s2t-against-{os.getpid()}-") as folder:
        place = Path(folder, "checkout")
        _git("worktree", "add", "--detach", str(place), commit)
        try:
            yield place
        finally:
            _git("worktree", "remove", "--force", str(place))


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"git {' '.join(words)}: {done.stderr.strip()}", hint="Name a commit of this repository.")
    return done.stdout.strip()


def _measured(trees: dict[str, Path], name: str, repeats: int, quick: bool) -> dict[str, Any]:
    """One model in both versions."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="s2t-against-")), name)
        prepare(name, folder)
        setup = {
            "threads": 1 if name == SLM or quick else torch.get_num_threads(),
            "tokens": 6 if quick else 101 if name == SLM else 33,
            "folder": str(folder),
            "dtype": str(usual_dtype()).removeprefix("torch."),
        }
        probes = {which: stack.enter_context(Probe(tree, setup)) for which, tree in trees.items()}
        rows = {row: _turns(probes, row, repeats) for row in ROWS}
        memory = {which: probe.ask("memory") for which, probe in probes.items()}
    kinds = {kind: [memory[which].get(kind) for which in ("old", "new")] for kind in ("rss_mb", "peak_rss_mb")}
    return {
        "rows": rows,
        "memory": {kind: _compared([old], [new]) for kind, (old, new) in kinds.items() if old and new},
    }


def prepare(name: str, folder: Path) -> None:
    """Write the bundled model, or a shape's tokenizer and config; what ends an answer is a token that no model says."""
    if name == SLM:
        shutil.copytree(model_path(SLM), folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        config = AutoConfig.from_pretrained(folder)
    else:
        tokenizer, config = tokenizer_of(name), tiny_config("qwen2", **SHAPES[name])
    tokenizer.eos_token = tokenizer.pad_token
    config.eos_token_id = tokenizer.pad_token_id
    for each in (tokenizer, config, GenerationConfig(eos_token_id=tokenizer.pad_token_id)):
        each.save_pretrained(folder)


def _turns(probes: dict[str, Probe], row: str, repeats: int) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {"old": [], "new": []}
    for turn in range(repeats + 1):
        for name in ("old", "new") if turn % 2 else ("new", "old"):
            measured = probes[name].ask(row, scope=f"{row}/{turn}")
            if turn:
                found[name].append(measured)
    times = {time: [[each[time] for each in found[name]] for name in ("old", "new")] for time in TIMES}
    return {time: _compared(old, new) for time, (old, new) in times.items() if None not in old}


def _compared(old: list[float], new: list[float]) -> dict[str, float]:
    ratios = [ours / theirs for ours, theirs in zip(new, old, strict=True)]
    return {"old": statistics.median(old), "new": statistics.median(new), "ratio": statistics.median(ratios)}


class Probe:
    """One version of the package in a process of its own.

    Args:
        tree: its checkout.
        setup: what it is to load, see ``against_probe``.
    """

    def __init__(self, tree: Path, setup: dict[str, Any]) -> None:
        self._tree, self._setup = tree, setup

    def __enter__(self) -> Probe:
        paths = {**os.environ, "PYTHONPATH": str(self._tree), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-P", str(PROBE)]  # -P: nothing beside the script hides a library
        self._process = subprocess.Popen(
            command, cwd=self._tree, env=paths, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            package = Path(self._told(self._setup)["package"])
            if package.resolve().parent != self._tree.resolve():
                raise ConfigError(f"{self._tree} was to be measured, and {package} was imported.")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, row: str, scope: str = "") -> dict[str, Any]:
        """What the version measures."""
        return self._told({"row": row, "scope": scope})

    def _told(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(question), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ConfigError(
                f"The version in {self._tree} cannot be measured (its error stands above).",
                hint="It needs the public names ChatS2T, Engine and LanguageModel.",
            )
        told: dict[str, Any] = json.loads(line)
        return told


def table(result: dict[str, Any]) -> Table:
    """The result for people."""
    before, after = result["load"]
    shown = Table(
        f"new is {result['new']}, old {result['old']}",
        "ms a token: old",
        "new",
        "ratio",
        "first token: ratio",
        "prompt seen before: ratio",
        title=f"medians of {result['repeats']} turns; load {before:.1f}, then {after:.1f}; {os.cpu_count()} cores",
        title_justify="left",
    )
    for model, found in result["models"].items():
        for row, times in found["rows"].items():
            first = (f"{times[kind]['ratio']:.3f}" if kind in times else "-" for kind in TIMES[1:])
            shown.add_row(f"{model}, {row}", *_cells(times[TIMES[0]]), *first)
        for kind, each in found["memory"].items():
            shown.add_row(f"{model}, {'peak' if kind.startswith('peak') else 'resident'} memory, MB", *_cells(each))
    return shown


def _cells(each: dict[str, float]) -> tuple[str, str, str]:
    return f"{each['old']:.2f}", f"{each['new']:.2f}", f"{each['ratio']:.3f}"
