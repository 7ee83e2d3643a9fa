"""Everything in order: collect, train, calibrate, evaluate. Killed and started again, it goes on where it was."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import combinations

from ..atomic_write import sole_run
from ..scheduling.language_model import LanguageModel
from ..selectors.config import Calibration, SelectorConfig
from .calibrate import calibrate_with
from .collect import collect
from .config import KINDS, Kind, Part, Pipeline
from .crew import Crew
from .evaluate import EvalReport, evaluate
from .plots import draw_reliability
from .probe import Sufficiency, probe
from .shards import read_shards
from .tasks import disjoint
from .train import train, train_with
from .verdicts import of_calibration, of_rollouts, of_training

PARTS = ("train", "heldout", "test", "again")


def pipeline(config: Pipeline, say: Callable[[str], None] = lambda _: None) -> tuple[Sufficiency, EvalReport]:
    """From prompts to calibrated selectors and the table of all rows.

    Args:
        config: see ``Pipeline``.
        say: told what happens next.

    Raises:
        FolderInUse: another pipeline is at work in ``config.out``.
        S2TError: as the stages do; what they had made is kept.
    """
    with sole_run(config.out):
        return _pipeline(config, say)


def _pipeline(config: Pipeline, say: Callable[[str], None]) -> tuple[Sufficiency, EvalReport]:
    kinds = sorted(config.kinds(), key=KINDS.index, reverse=True)  # the dearest first, so that none is left alone
    say("prompts")
    tasks = {part: task.open() for part in PARTS if (task := getattr(config.tasks, part)) is not None}
    for (name, one), (another, other) in combinations(tasks.items(), 2):
        disjoint(one, other, (f"[tasks.{name}]", f"[tasks.{another}]"))
    with Crew(config.processes) as crew:
        say(f"collect train: {len(tasks['train'].items)} items of {tasks['train'].name}")
        _collect(config, "train", crew, say)
        say(f"collect heldout: {len(tasks['heldout'].items)} items of {tasks['heldout'].name}")
        _collect(config, "heldout", crew, say)
        if "again" in tasks:
            say(f"collect again: {len(tasks['again'].items)} items, on policy")
            first_selector(config)
            _collect(config, "again", crew, say)
        for kind in kinds:
            say(f"train {kind}")
            with crew.shown():
                folder = train(config.training(kind), crew)
            if verdict := of_training(SelectorConfig.load(folder).training):
                say(f"{kind}: {verdict}")
        for kind in crew.each(partial(_calibrate, config), kinds):
            say(f"{kind} is calibrated")
            calibration = SelectorConfig.load(config.selector(kind)).calibration
            if calibration is not None and (verdict := of_calibration(calibration)):
                say(f"{kind}: {verdict}")
        say("probe")
        sufficiency = probe(config.probing())
        say(f"evaluate: {len(tasks['test'].items)} items of {tasks['test'].name}")
        return sufficiency, evaluate(config.evaluating(), crew)


def _collect(config: Pipeline, part: Part, crew: Crew, say: Callable[[str], None]) -> None:
    settings = config.collecting(part)
    if verdict := of_rollouts(settings, read_shards(collect(settings, crew).parent)):
        say(f"{part}: {verdict}")


def first_selector(config: Pipeline) -> None:
    """Train and calibrate the selector of the on-policy round; the same however often."""
    first, slm = config.first(), config.models.load_slm()
    train_with(slm, first)
    calibrate_with(slm, config.calibrating(first.kind).model_copy(update={"selector": first.out}))


def _calibrate(config: Pipeline, kind: Kind) -> Kind:
    """One kind, in a crew's process; returns which."""
    calibrate_kind(config, kind, config.models.load_slm())
    return kind


def calibrate_kind(config: Pipeline, kind: Kind, slm: LanguageModel) -> Calibration:
    """Calibrate one selector and draw its reliability beside the others'."""
    calibration = calibrate_with(slm, config.calibrating(kind))
    folder = config.out / "calibration"
    draw_reliability(calibration, folder / f"reliability-{kind}.png")
    return calibration
