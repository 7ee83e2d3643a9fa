"""Everything in order: collect, train, calibrate, evaluate. Killed and started again, it goes on where it was."""

from __future__ import annotations

from collections.abc import Callable

from ..models.language_model import LanguageModel
from ..selectors.config import Calibration
from .calibrate import calibrate_with
from .collect import collect_with, open_teacher
from .config import Kind, Pipeline
from .evaluate import EvalReport, evaluate
from .plots import draw_reliability
from .probe import Sufficiency, probe
from .tasks import disjoint
from .train import train_with


def pipeline(config: Pipeline, say: Callable[[str], None] = lambda _: None) -> tuple[Sufficiency, EvalReport]:
    """From prompts to calibrated selectors and the table of all rows.

    Args:
        config: see ``Pipeline``.
        say: told what happens next.

    Raises:
        S2TError: as the stages do; what they had made is kept.
    """
    say("prompts")
    tasks = config.tasks.train.open(), config.tasks.heldout.open(), config.tasks.test.open()
    for one, other in ((0, 1), (0, 2), (1, 2)):
        disjoint(tasks[one], tasks[other])
    slm = config.models.load_slm()
    teacher = open_teacher(config.models, slm)
    for part, task in (("train", tasks[0]), ("heldout", tasks[1])):
        say(f"collect {part}: {len(task.items)} items of {task.name}")
        collect_with(slm, teacher, task, config.collect, config.out / "rollouts" / part)
    for kind in config.train:
        say(f"train {kind}")
        train_with(slm, config.training(kind))
        say(f"calibrate {kind}")
        calibrate_kind(config, kind, slm)
    say("probe")
    sufficiency = probe(config.probing())
    say(f"evaluate: {len(tasks[2].items)} items of {tasks[2].name}")
    return sufficiency, evaluate(config.evaluating())


def calibrate_kind(config: Pipeline, kind: Kind, slm: LanguageModel) -> Calibration:
    """Calibrate one selector and draw its reliability beside the others'."""
    calibration = calibrate_with(slm, config.calibrating(kind))
    folder = config.out / "calibration"
    folder.mkdir(parents=True, exist_ok=True)
    draw_reliability(calibration, folder / f"reliability-{kind}.png")
    return calibration
