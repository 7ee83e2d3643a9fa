"""What a stage's figures come to, in a line, where it ended without a fault and brought nothing, or harm.

A share counts as large or small by its 95% interval, never by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..intervals import wilson
from ..selectors.config import Calibration
from .config import CollectConfig
from .report import RowReport
from .settings import KINDS
from .shards import Shard, read_manifest
from .tasks import JsonlTaskConfig

FEW = 0.1
"""Share of answers: where two models differ in fewer, a selector has next to nothing to change."""

HARM = 0.05
"""Share of the answers that were right, or had nothing to fix: a selector that surely changes more does harm."""

FEW_STEPS = 50
"""Steps, or groups: from fewer the 95% interval of a share is over 20 points wide, and nothing can be told."""


def graded(config: CollectConfig) -> bool:
    """Whether rollouts are compared with answers; a file that is read with ``answers = false`` has none."""
    return not isinstance(config.task, JsonlTaskConfig) or config.task.answers


def of_rollouts(config: CollectConfig, shards: Sequence[Shard]) -> str | None:
    """Where answers are graded and not one is right; None otherwise.

    Args:
        config: that the rollouts were made with.
        shards: all of them.
    """
    if not graded(config) or any(bool(shard.right.any()) for shard in shards):
        return None
    answers = read_manifest(config.out).items * (config.rollouts.greedy + config.rollouts.samples)
    if isinstance(config.task, JsonlTaskConfig):
        return f"None of {answers} answers is right as graded ({config.task.grading}): check `grading`."
    return f"None of {answers} answers is right."


def of_difference(steps: float, answers: float) -> str | None:
    """Where the LLM would have said nearly all answers alike; None otherwise.

    A share of the steps alone tells little: one wrong digit spoils a long answer.

    Args:
        steps: share of them where the LLM's best token is not the SLM's.
        answers: share of them with such a step; a selector that learns from this LLM changes no others.
    """
    if answers >= FEW:
        return None
    return (
        f"The models hardly differ: at {steps:.2%} of the steps, in {answers:.1%} of the answers (under {FEW:.0%}). "
        "A selector can change no others."
    )


def of_hits(by: str, rate: float, steps: int) -> str | None:
    """Where a row of Hit@K has too few steps to be judged by; None otherwise.

    Args:
        by: what its steps were ranked by.
        rate: share of all steps.
        steps: how many they are.
    """
    if steps >= FEW_STEPS:
        return None
    return (
        f"The top {rate:.0%} by {by} are {steps} step{'s' * (steps != 1)}, too few to judge Hit@K by "
        f"(under {FEW_STEPS}): read a row of more, or collect more held-out prompts."
    )


def of_training(figures: Mapping[str, Any]) -> str | None:
    """Where no step was better than none, or the last one was the best; None otherwise, and where that is not known.

    Args:
        figures: ``training`` of ``selector.json``.
    """
    best, steps = figures.get("best_step"), figures.get("steps")
    if best is None or (best and best != steps):
        return None
    if best:
        return (
            f"Still improving at the last of {steps} steps (agreement {figures['agreement']:.1%}): raise `epochs`, and "
            "train again."
        )
    groups, answers = figures.get("validation_groups", FEW_STEPS), figures.get("validation_trajectories")
    small = (
        f" But {groups} validation groups in {answers} answers are too few to tell (under {FEW_STEPS} groups): raise "
        "`validation`, or collect more."
    )
    return (
        f"Learned nothing: no evaluation in {steps} steps beat the untrained order "
        f"(agreement {figures['agreement_untrained']:.1%}), so this selector changes nothing."
    ) + (small if groups < FEW_STEPS else "")


def of_calibration(found: Calibration) -> str | None:
    """Where a selector changes answers that should stay, or agrees with the LLM no more than the SLM; else None."""
    said = []
    if found.false_alarms is not None and found.false_alarms_ci95 and found.false_alarms_ci95[0] > HARM:
        said.append(
            f"It changes {share(found.false_alarms, found.false_alarms_ci95)} of the answers in which the LLM would "
            f"change nothing, surely over {HARM:.0%}: set `false_alarms = {HARM}` under [calibrate], calibrate again."
        )
    agreement, greedy = share(found.agreement, found.agreement_ci95), found.agreement_greedy
    if found.agreement_ci95[1] < greedy:
        said.append(
            f"At triggered steps it agrees with the LLM less ({agreement}) than the small model alone ({greedy:.1%}): "
            "do not use it. Train on more prompts, or another kind."
        )
    elif found.agreement_ci95[0] <= greedy:
        said.append(
            f"At triggered steps it agrees with the LLM ({agreement}) no more for sure than the small model alone "
            f"({greedy:.1%}): collect more held-out prompts to tell; train on more, or another kind."
        )
    return " ".join(said) or None


def of_table(rows: Mapping[str, RowReport]) -> str | None:
    """Where the LLM leaves no gap to close, or a selector closes none or breaks what was right; None otherwise.

    A gain is sure where, of the answers that become right or wrong, the 95% interval of those that become right lies
    above a half: the problems are the same for both rows.

    Args:
        rows: of an evaluation, with ``slm`` and ``llm``.
    """
    slm = rows["slm"]
    said = []
    if (unsure := _no_gain(rows["llm"], slm)) is not None:
        said.append(
            f"The LLM alone {unsure}: there may be no gap to close. Take a larger LLM, or test on more problems."
        )
    for row in (rows[kind] for kind in KINDS if kind in rows):
        if not row.flip_rate:
            said.append(
                f"{row.name} changes nothing (flips 0%): allow more `false_alarms` under [calibrate], or train on more "
                "prompts, or another kind."
            )
            continue
        if (unsure := _no_gain(row, slm)) is not None:
            said.append(f"{row.name} {unsure}: test on more problems to tell; train on more prompts, or another kind.")
        if row.broken is not None and row.broken_ci95 and row.broken_ci95[0] > HARM:
            said.append(
                f"{row.name} breaks {share(row.broken, row.broken_ci95)} of the right answers, surely over {HARM:.0%}:"
                f" set a smaller `false_alarms` under [calibrate] ({HARM} where there is none), and calibrate again."
            )
    return " ".join(said) or None


def _no_gain(row: RowReport, slm: RowReport) -> str | None:
    """How many answers became right and wrong, where that is no sure gain; None where it is."""
    broken = round((row.broken or 0) * slm.accuracy * slm.n)
    mended = round((row.accuracy - slm.accuracy) * slm.n) + broken
    if wilson(mended, mended + broken)[0] > 0.5:
        return None
    return f"makes {mended} answers right and {broken} wrong, no sure gain"


def share(value: float, interval: tuple[float, float]) -> str:
    """A share with its 95% interval, for people."""
    return f"{value:.1%} (95% {interval[0]:.1%} to {interval[1]:.1%})"
