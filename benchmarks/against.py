"""Another commit of this repository beside the working tree: time per token, first token and memory, in one run.

The commit is checked out into a temporary git worktree. Each version has a process of its own (``against_probe``), and
both measure in turns, old new new old: a machine that slows down meanwhile does so for both. Ratios are new over old,
medians of those within each turn. No turn begins that would not end within the time.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
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
TOKENS = {SLM: 101}
FEW_TOKENS = 17
"""Of an answer: of the bundled model, and of all else."""

LEAST_TURNS = 2
"""That are measured however long they take."""

TIMES = ("ms_per_token", "first_cold_ms", "first_warm_ms")
MODELS = (SLM, "qwen2.5-0.5b")
QUICK = ("tiny",)


def run(
    commit: str,
    *,
    repeats: int = 10,
    minutes: float = 9.0,
    model: str | None = None,
    quick: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Both versions on the bundled model (one thread) and the 0.5B shape (all threads).

    Args:
        commit: any name git knows it by.
        repeats: turns of each row, after one that is thrown away, at most.
        minutes: of all models together, from the first to the last turn; at least ``LEAST_TURNS`` are measured.
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
    load, repeats, started = [os.getloadavg()[0]], 1 if quick else repeats, time.monotonic()
    models: dict[str, Any] = {}
    with terminated_by_exit(), checkout(commit) as old:
        for number, name in enumerate(chosen, 1):
            until = started + 60 * minutes * number / len(chosen)
            models[name] = _measured({"old": old, "new": ROOT}, name, repeats, until, quick=quick, say=say)
    load.append(os.getloadavg()[0])
    return {
        "bench": "against",
        "old": _git("rev-parse", "--short", commit),
        "new": _git("describe", "--always", "--dirty"),
        "seconds": time.monotonic() - started,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "load": load,
        "models": models,
    }


@contextmanager
def terminated_by_exit() -> Iterator[None]:
    """Inside the block a SIGTERM, as of ``timeout``, ends the process by ``SystemExit``: what was made is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(*_: Any) -> None:
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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


def _measured(
    trees: dict[str, Path], name: str, repeats: int, until: float, *, quick: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """One model in both versions, its turns within the time if more than ``LEAST_TURNS`` are."""
    say(name)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="s2t-against-")), name)
        prepare(name, folder)
        setup = {
            "threads": 1 if name == SLM or quick else torch.get_num_threads(),
            "tokens": 6 if quick else TOKENS.get(name, FEW_TOKENS),
            "folder": str(folder),
            "dtype": str(usual_dtype()).removeprefix("torch."),
        }
        probes = {which: stack.enter_context(Probe(tree, setup)) for which, tree in trees.items()}
        turns: list[dict[str, dict[str, dict[str, Any]]]] = []
        longest = 0.0
        while len(turns) <= repeats:
            started = time.monotonic()
            if len(turns) > LEAST_TURNS and started + longest > until:
                break
            turns.append(_turn(probes, len(turns)))
            longest = max(longest, time.monotonic() - started)
            say(f"  turn {len(turns) - 1} of {repeats}: {time.monotonic() - started:.0f} s")
        memory = {which: probe.ask("memory") for which, probe in probes.items()}
    kinds = {kind: [memory[which].get(kind) for which in ("old", "new")] for kind in ("rss_mb", "peak_rss_mb")}
    return {
        "turns": len(turns) - 1,
        "rows": {row: _over_turns([turn[row] for turn in turns[1:]]) for row in ROWS},  # the first warms up
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


def _turn(probes: dict[str, Probe], turn: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Every row once in both versions: what each measured, by row and version."""
    order = ("old", "new") if turn % 2 else ("new", "old")
    return {row: {name: probes[name].ask(row, scope=f"{row}/{turn}") for name in order} for row in ROWS}


def _over_turns(found: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """One row: both versions' times compared."""
    times = {kind: [[each[name][kind] for each in found] for name in ("old", "new")] for kind in TIMES}
    return {kind: _compared(old, new) for kind, (old, new) in times.items() if None not in old}


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
        title=f"medians over turns, of {_turns_of(result)}; load {before:.1f}, then {after:.1f}",
        title_justify="left",
    )
    for model, found in result["models"].items():
        for row, times in found["rows"].items():
            first = (f"{times[kind]['ratio']:.3f}" if kind in times else "-" for kind in TIMES[1:])
            shown.add_row(f"{model}, {row}", *_cells(times[TIMES[0]]), *first)
        for kind, each in found["memory"].items():
            shown.add_row(f"{model}, {'peak' if kind.startswith('peak') else 'resident'} memory, MB", *_cells(each))
    return shown


def _turns_of(result: dict[str, Any]) -> str:
    return ", ".join(f"{name} {found['turns']}" for name, found in result["models"].items())


def markdown(result: dict[str, Any], made: dict[str, Any]) -> str:
    """The result for docs/performance.md."""
    heads = (f"{result['new']} beside {result['old']}", "ms a token: old", "new", "ratio", "first token: ratio")
    lines = [f"| {' | '.join((*heads, 'prompt seen before: ratio'))} |", "|---" * (len(heads) + 1) + "|"]
    for model, found in result["models"].items():
        for row, times in found["rows"].items():
            first = (f"{times[kind]['ratio']:.2f}" if kind in times else "-" for kind in TIMES[1:])
            lines.append(f"| {' | '.join((f'{model}, {row}', *_cells(times[TIMES[0]]), *first))} |")
        for kind, each in found["memory"].items():
            name = f"{model}, {'peak' if kind.startswith('peak') else 'resident'} memory, MB"
            lines.append(f"| {' | '.join((name, *_cells(each), '-', '-'))} |")
    before, after = result["load"]
    note = (
        f"Medians over turns, of {_turns_of(result)}; ratios within each turn. Load {before:.1f}, then {after:.1f}; "
        f"{made['hardware']}, torch {result['torch']}, {made['date']}. Made by `s2t bench against {result['old']}`."
    )
    return "\n".join([*lines, "", note])


def _cells(each: dict[str, float]) -> tuple[str, str, str]:
    return f"{each['old']:.2f}", f"{each['new']:.2f}", f"{each['ratio']:.3f}"
