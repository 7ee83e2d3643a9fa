"""What a stage's figures come to, in a line, where it ended without a fault and brought nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .config import CollectConfig
from .shards import Shard, read_manifest
from .tasks import JsonlTaskConfig

FEW = 0.1
"""Share of answers: where two models differ in fewer, a selector has next to nothing to change."""


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


def of_training(figures: Mapping[str, Any]) -> str | None:
    """Where no step was better than none; None otherwise, and where that is not known.

    Args:
        figures: ``training`` of ``selector.json``.
    """
    if figures.get("best_step") != 0:
        return None
    return (
        f"Learned nothing: no evaluation in {figures['steps']} steps beat the untrained order "
        f"(agreement {figures['agreement_untrained']:.1%}), so this selector changes nothing."
    )
