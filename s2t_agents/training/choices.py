"""What an evaluation from the command line means: which problems, which selectors."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import combinations
from pathlib import Path

import torch

from ..bundled import SELECTORS, selector_path
from ..errors import ConfigError, S2TError
from ..selectors.config import CONFIG_FILE, SelectorConfig
from .config import KINDS, EvaluateConfig, EvaluationRows, Kind, Pipeline
from .groups import threshold_for
from .shards import MANIFEST, read_manifest, read_shards
from .tasks import DemoTaskConfig, Grading, JsonlTaskConfig, Split, Task, TaskConfig, disjoint

SEED_STRIDE = 100_000
"""Problems between the first ones of two seeds, so that different seeds share no problem."""

PROBLEMS = 500
"""Of a task that is named without saying how many."""

KS = (1, 2, 4, 8, 16)
RATES = (0.01, 0.02, 0.05, 0.1, 0.2)


def evaluation(
    pipeline: Pipeline,
    task: str | None,
    n: int | None,
    seed: int | None,
    selectors: Sequence[Path],
    out: Path | None,
    *,
    sweep: bool,
    grading: Grading | None = None,
    bundled: bool = False,
) -> EvaluateConfig:
    """The evaluation that a command line asks for, over what the config says.

    Args:
        pipeline: the config.
        task: a name of the config's ``[tasks.named]``, or as in ``task_named``; None takes the config's own test task.
        n: problems; None takes as many as the config's own task has, and ``PROBLEMS`` of one that it does not have.
        seed: of sampling, and of the problems of a demo task; None takes the config's own, and 0 for a named task.
        selectors: directories or names of bundled ones, one of a kind; the config's own where there is none.
        out: folder of the report.
        sweep: over K and the trigger rate besides.
        grading: of a JSONL file; None grades as the config grades its own test file.
        bundled: see ``found_selectors``.

    Raises:
        ConfigError: no such task or selector; two selectors of one kind; a grading for the demo world; prompts that
            the config trains or calibrates on.
    """
    rows = pipeline.evaluate
    if sweep:
        rows = EvaluationRows(**{**rows.model_dump(), "ks": KS, "rates": RATES})
    own = pipeline.tasks.test if task is None else pipeline.tasks.named.get(task)
    if own is not None:
        chosen = _part_of(own, n, seed)
    else:
        assert task is not None
        own = pipeline.tasks.test
        graded: Grading = own.grading if isinstance(own, JsonlTaskConfig) else "numeric"
        chosen = task_named(task, n, seed or 0, graded, pipeline.tasks.named)
    chosen = _graded(chosen, grading)
    check_unseen(pipeline, chosen)
    found = found_selectors(pipeline, selectors, bundled=bundled)
    if not found:
        rows = with_trigger(pipeline, rows)
    return EvaluateConfig(
        models=pipeline.models,
        task=chosen,
        selectors=found,
        out=out,
        rows=rows,
        seed=seed if seed is not None else pipeline.seed if task is None else 0,
    )


SPLITS: dict[str, Split] = {
    "demo": "heldout", "longer": "longer", "larger": "larger", "unseen": "unseen", "hard": "hard"
}  # fmt: skip
"""Splits of the demo world by the names that ``s2t eval --task`` takes."""

PROBLEM_KINDS = ("talk", "call", "tool", "word")
"""Kinds of the demo world's problems that it takes too."""


def task_named(
    name: str, n: int | None, seed: int, grading: Grading = "numeric", others: Collection[str] = ()
) -> TaskConfig:
    """A split of the demo world (``SPLITS``), one of its kinds (``PROBLEM_KINDS``), or a JSONL file.

    Args:
        name: of the task.
        n: problems; None takes ``PROBLEMS``, or all of a file that holds fewer.
        seed: of them.
        grading: of a JSONL file.
        others: names that the config has besides, for the error.

    Raises:
        ConfigError: it is none of these.
    """
    first = seed * SEED_STRIDE
    if name in SPLITS:
        return DemoTaskConfig(split=SPLITS[name], first=first, count=n or PROBLEMS)
    if name in PROBLEM_KINDS:
        return DemoTaskConfig(split="heldout", first=first, count=n or PROBLEMS, kinds=(name,))
    if not Path(name).is_file():
        raise ConfigError(
            f"task is {name!r}, which is no task and no file.",
            hint=f"Use {', '.join([*others, *SPLITS, *PROBLEM_KINDS])}, or a JSONL file of prompts.",
        )
    whole = JsonlTaskConfig(task="jsonl", path=Path(name), grading=grading)
    return whole.model_copy(update={"count": n or min(PROBLEMS, len(whole.open().items))})


def _part_of(own: TaskConfig, n: int | None, seed: int | None) -> TaskConfig:
    """So many problems of the config's own task: of a demo task those of another seed, of public data spaced out.

    Raises:
        ConfigError: more than the config gives it.
    """
    if isinstance(own, DemoTaskConfig):
        return own.model_copy(update={"count": n or own.count, "first": own.first + (seed or 0) * SEED_STRIDE})
    if n is None:
        return own
    there = len(own.open().items)
    if n > there:
        raise ConfigError(f"n is {n}, but the config's part holds {there} problems.", hint="Ask for no more.")
    if isinstance(own, JsonlTaskConfig):
        return own.model_copy(update={"count": n})
    return own.model_copy(update={"count": n, "every": own.every * max(1, there // n)})


def _graded(task: TaskConfig, grading: Grading | None) -> TaskConfig:
    if grading is None:
        return task
    if not isinstance(task, JsonlTaskConfig):
        raise ConfigError(
            f"grading is {grading!r}, but {'the demo world' if task.task == 'demo' else task.task} grades its own "
            "problems.",
            hint="Leave it out, or name a JSONL file as the task.",
        )
    return task.model_copy(update={"grading": grading})


PARTS = ("train", "heldout", "again", "test")


def check_parts(pipeline: Pipeline) -> None:
    """Refuse a config whose parts share prompts; a part that cannot be opened here is passed over.

    Raises:
        ConfigError: naming the parts and the first shared prompt.
    """
    there: dict[str, TaskConfig] = {part: task for part in PARTS if (task := getattr(pipeline.tasks, part)) is not None}
    near = [pair for pair in combinations(there, 2) if not _far_apart(*(there[part] for part in pair))]
    opened = {part: _opened(there[part]) for part in {part for pair in near for part in pair}}
    for part, other in near:
        if (one := opened[part]) is not None and (another := opened[other]) is not None:
            disjoint(one, another, (f"[tasks.{part}]", f"[tasks.{other}]"))


def check_unseen(pipeline: Pipeline, task: TaskConfig) -> None:
    """Refuse a test task that shares prompts with other parts of the config; those that cannot be opened here are
    passed over.

    Raises:
        ConfigError: naming the first shared prompt.
        InputError: the task itself cannot be opened.
    """
    for part in PARTS[:3]:
        seen: TaskConfig | None = getattr(pipeline.tasks, part)
        if seen is None or _far_apart(seen, task):
            continue
        if (opened := _opened(seen)) is not None:
            disjoint(opened, task.open(), (f"[tasks.{part}]", "the test task"))


def _opened(task: TaskConfig) -> Task | None:
    """None where it cannot be opened: a selector may be tested where its training prompts are not."""
    try:
        return task.open()
    except S2TError:
        return None


def _far_apart(one: TaskConfig, other: TaskConfig) -> bool:
    """Whether two tasks share nothing as far as can be told without making their problems."""
    if not isinstance(one, DemoTaskConfig) or not isinstance(other, DemoTaskConfig):
        return one.task != other.task
    return one.split != other.split or one.first + one.count <= other.first or other.first + other.count <= one.first


def found_selectors(pipeline: Pipeline, given: Sequence[Path], *, bundled: bool = False) -> dict[Kind, Path]:
    """Selectors by kind: those given, else those that the config trains, as far as they are there (see ``lacking``).

    Args:
        pipeline: the config.
        given: directories, or names of bundled selectors.
        bundled: take the bundled ones where none of the config's own is there; for the bundled config alone.

    Raises:
        ConfigError: two of one kind were given.
    """
    if given:
        return _by_kind([selector_path(folder) for folder in given])
    own = {kind: pipeline.selector(kind) for kind in pipeline.train or KINDS}
    found = {kind: folder for kind, folder in own.items() if (folder / CONFIG_FILE).exists()}
    return found if found or not bundled else _by_kind(list(dict.fromkeys(SELECTORS.values())))


def lacking(pipeline: Pipeline, found: Collection[Kind]) -> dict[Kind, Path]:
    """The selectors that the config trains and that are not among those found, by kind."""
    return {kind: pipeline.selector(kind).absolute() for kind in pipeline.train if kind not in found}


def with_trigger(pipeline: Pipeline, rows: EvaluationRows) -> EvaluationRows:
    """Where no selector's calibration says when the LLM is asked: as the config says, or at the entropy that the wanted
    share of the held-out rollouts' steps reaches, if there are any.
    """
    folder = pipeline.rollouts("heldout")
    if rows.llm_trigger_entropy is not None or not (folder / MANIFEST).exists():
        return rows
    answers = [shard.entropy[steps] for shard in read_shards(folder) for *_, steps in shard.trajectories()]
    limit = read_manifest(folder).settings["max_tokens"]
    finished = [entropy for entropy in answers if len(entropy) < limit]  # as `calibrate` does
    entropy = torch.cat(finished or answers)
    return rows.model_copy(update={"llm_trigger_entropy": max(0.0, threshold_for(entropy, rows.llm_trigger_rate))})


def _by_kind(folders: Sequence[Path]) -> dict[Kind, Path]:
    found: dict[Kind, Path] = {}
    for folder in folders:
        kind = SelectorConfig.load(folder).kind
        if kind in found:
            raise ConfigError(
                f"{found[kind]} and {folder} are both {kind} selectors; a table has one of each kind.",
                hint="Evaluate them one after the other.",
            )
        found[kind] = folder
    return found
