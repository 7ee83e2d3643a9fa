"""Everything in order: collect, train, calibrate, evaluate. Killed and started again, it goes on where it was."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

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
    again = config.tasks.again
    tasks = [config.tasks.train.open(), config.tasks.heldout.open(), config.tasks.test.open()]
    tasks += [again.open()] if again is not None else []
    for one, other in combinations(tasks, 2):
        disjoint(one, other)
    slm = config.models.load_slm()
    teacher = open_teacher(config.models, slm)
    for part, task in (("train", tasks[0]), ("heldout", tasks[1])):
        say(f"collect {part}: {len(task.items)} items of {task.name}")
        collect_with(slm, teacher, task, config.collect, config.out / "rollouts" / part)
    if again is not None:
        say(f"collect again: {len(tasks[3].items)} items, on policy")
        first_selector(config, slm)
        onward = config.collecting("again")
        collect_with(slm, teacher, tasks[3], onward.rollouts, onward.out)
    for kind in config.train:
        say(f"train {kind}")
        train_with(slm, config.training(kind))
        say(f"calibrate {kind}")
        calibrate_kind(config, kind, slm)
    say("probe")
    sufficiency = probe(config.probing())
    say(f"evaluate: {len(tasks[2].items)} items of {tasks[2].name}")
    return sufficiency, evaluate(config.evaluating())


def first_selector(config: Pipeline, slm: LanguageModel) -> None:
    """Train and calibrate the selector of the on-policy round; the same however often."""
    first = config.first()
    train_with(slm, first)
    calibrate_with(slm, config.calibrating(first.kind).model_copy(update={"selector": first.out}))


def calibrate_kind(config: Pipeline, kind: Kind, slm: LanguageModel) -> Calibration:
    """Calibrate one selector and draw its reliability beside the others'."""
    calibration = calibrate_with(slm, config.calibrating(kind))
    folder = config.out / "calibration"
    draw_reliability(calibration, folder / f"reliability-{kind}.png")
    return calibration
