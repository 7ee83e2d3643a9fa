"""Paid selections as training examples: what an LLM was asked in earnest is not asked again in vain.

They teach the selector and nothing else. Probe, early stopping and calibration stay on the rollouts: an agent asks only
where its selector was unsure, so what was paid for is no sample of all steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from ..errors import InputError
from ..escalation import PaidGroup, read_groups
from ..scheduling.language_model import LanguageModel
from .groups import Example

T = TypeVar("T")


@dataclass(frozen=True)
class Paid:
    """What some files of paid selections teach.

    Attributes:
        examples: their critical steps are the paid ones; of other steps nothing is known (``differs`` and ``entropy``
            are empty). Unknown scores of the LLM are NaN.
        groups: paid selections in them.
        left_out: paid selections that teach nothing: the LLM's pick is not among the first K candidates.
    """

    examples: list[Example]
    groups: int
    left_out: int


def read_paid(slm: LanguageModel, files: Sequence[Path], k: int) -> Paid:
    """Read files that ``Escalation(record=...)`` wrote; selections along one answer become one example.

    Args:
        slm: refuse groups of any other model.
        files: JSON lines.
        k: candidates per group; wider groups are cut, narrower ones filled up with candidates that have no chance.

    Raises:
        InputError: a file that cannot be read, or holds something else.
        ConfigError: groups of another SLM.
    """
    for file in files:
        if not file.is_file():
            raise InputError(
                f"{file}: No such file in {file.absolute().parent}.",
                hint='Give the file that Escalation(record="...") wrote, or leave it out.',
            )
    found = [group for file in files for group in read_groups(file, slm)]
    useful = [group for group in found if len(group.candidates) > 1 and group.pick < k]
    examples = [_example(chain, k) for chain in _chains(useful)]
    return Paid(examples, len(useful), len(found) - len(useful))


def _chains(groups: Sequence[PaidGroup]) -> list[list[PaidGroup]]:
    """Groups whose prefixes continue each other, the shortest first; one read of the longest serves them all."""
    chains: list[list[PaidGroup]] = []
    for group in sorted(groups, key=lambda group: group.ids):  # a prefix sorts right before what continues it
        last = chains[-1][-1].ids if chains else None
        if last is not None and group.ids[: len(last)] == last:
            chains[-1].append(group)
        else:
            chains.append([group])
    return chains


def _example(chain: Sequence[PaidGroup], k: int) -> Example:
    positions = torch.tensor([len(group.ids) for group in chain])
    return Example(
        ids=list(chain[-1].ids),
        item="paid",
        positions=positions,
        candidates=torch.tensor([_filled(group.candidates, k, group.candidates[0]) for group in chain]),
        slm=torch.tensor([_filled(group.slm, k, float("-inf")) for group in chain]),
        llm=torch.tensor([_filled(_known(group), k, float("nan")) for group in chain]),
        all_positions=torch.arange(int(positions[0]), int(positions[-1]) + 1),
        differs=torch.empty(0, dtype=torch.bool),
        entropy=torch.empty(0),
    )


def _known(group: PaidGroup) -> list[float]:
    return [float("nan") if score is None else score for score in group.llm]


def _filled(values: Sequence[T], k: int, filler: T) -> list[T]:
    return [*values[:k], *[filler] * (k - len(values))]
