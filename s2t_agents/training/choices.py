"""What an evaluation from the command line means: which problems, which selectors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..models.bundled import SELECTORS
from ..selectors.config import CONFIG_FILE, SelectorConfig
from .config import KINDS, EvaluateConfig, Kind, Pipeline, Rows
from .tasks import DemoTaskConfig, Grading, JsonlTaskConfig, Split, TaskConfig

SEED_STRIDE = 100_000
"""Problems between the first ones of two seeds, so that different seeds share no problem."""

KS = (1, 2, 4, 8, 16)
RATES = (0.01, 0.02, 0.05, 0.1, 0.2)


def evaluation(
    pipeline: Pipeline,
    task: str | None,
    n: int,
    seed: int,
    selectors: Sequence[Path],
    out: Path | None,
    *,
    sweep: bool,
    grading: Grading | None = None,
) -> EvaluateConfig:
    """The evaluation that a command line asks for, over what the config says.

    A prompt file that is named here is graded as ``grading`` says, else as the config grades its own test prompts.
    """
    own = pipeline.tasks.test
    graded: Grading = grading or (own.grading if isinstance(own, JsonlTaskConfig) else "numeric")
    rows = pipeline.evaluate
    if sweep:
        rows = Rows(**{**rows.model_dump(), "ks": KS, "rates": RATES})
    return EvaluateConfig(
        models=pipeline.models,
        task=own if task is None else task_named(task, n, seed, graded),
        selectors=found_selectors(pipeline, selectors),
        out=out,
        rows=rows,
        seed=seed,
    )


SPLITS: dict[str, Split] = {
    "demo": "heldout", "longer": "longer", "larger": "larger", "unseen": "unseen", "hard": "hard"
}  # fmt: skip
"""Splits of the demo world by the names that ``s2t eval --task`` takes."""


def task_named(name: str, n: int, seed: int, grading: Grading = "numeric") -> TaskConfig:
    """A split of the demo world (``SPLITS``), one of its kinds (``talk``, ``call``, ``tool``, ``word``), or a file."""
    first = seed * SEED_STRIDE
    if name in SPLITS:
        return DemoTaskConfig(split=SPLITS[name], first=first, count=n)
    if name in ("talk", "call", "tool", "word"):
        return DemoTaskConfig(split="heldout", first=first, count=n, kinds=(name,))
    return JsonlTaskConfig(task="jsonl", path=Path(name), grading=grading, count=n)


def found_selectors(pipeline: Pipeline, given: Sequence[Path]) -> dict[Kind, Path]:
    """Selectors by kind: those given, else those of the config's folder, else the bundled ones."""
    if given:
        return {SelectorConfig.load(folder).kind: folder for folder in given}
    own: dict[Kind, Path] = {
        kind: pipeline.selector(kind) for kind in KINDS if (pipeline.selector(kind) / CONFIG_FILE).exists()
    }
    bundled = [folder for folder in dict.fromkeys(SELECTORS.values()) if (folder / CONFIG_FILE).exists()]
    return own or {SelectorConfig.load(folder).kind: folder for folder in bundled}
