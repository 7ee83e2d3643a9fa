"""What SLM and LLM say along a trajectory: each model reads it once, and only the K candidates are kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..models.batch_prefix import left_padded
from ..models.language_model import LanguageModel
from ..proposal import entropy_of
from .shards import ModelIdentity

Trajectory = tuple[list[int], list[int]]
"""Prompt ids and completion ids."""

BATCH_TOKENS = 4096
"""Tokens per forward, padding included, while trajectories are labelled."""


@dataclass(frozen=True)
class Opinion:
    """The LLM on n steps of one trajectory.

    Attributes:
        candidates: ``[n, K]`` log-probabilities of the SLM's candidates.
        best: ``[n]`` the LLM's own best tokens.
        kl: ``[n]`` KL(LLM || SLM) in nats.
    """

    candidates: Tensor
    best: Tensor
    kl: Tensor


class Teacher(Protocol):
    """An LLM that labels trajectories; ``LocalTeacher`` here, ``RemoteTeacher`` behind a server."""

    identity: ModelIdentity

    def opinions(
        self, trajectories: Sequence[Trajectory], slm: Sequence[Tensor], candidates: Sequence[Tensor]
    ) -> list[Opinion]:
        """One per trajectory, given the SLM's log-probabilities ``[n, V]`` and candidates ``[n, K]`` along each."""
        ...


@dataclass(frozen=True)
class Labels:
    """Everything kept of one trajectory's n steps; fields as in ``shards.Shard``."""

    candidates: Tensor
    slm: Tensor
    llm: Tensor
    llm_best: Tensor
    kl: Tensor
    entropy: Tensor


def label(slm: LanguageModel, teacher: Teacher, trajectories: Sequence[Trajectory], k: int) -> list[Labels]:
    """Label all steps of all trajectories, in their order."""
    labels: list[Labels | None] = [None] * len(trajectories)
    for batch in batches([len(prompt) + len(ids) for prompt, ids in trajectories]):
        part = [trajectories[at] for at in batch]
        ours = along(slm, part)
        tops = [log_probs.topk(min(k, log_probs.shape[1])) for log_probs in ours]
        opinions = teacher.opinions(part, ours, [top.indices for top in tops])
        for at, log_probs, top, opinion in zip(batch, ours, tops, opinions, strict=True):
            entropy = entropy_of(log_probs)
            labels[at] = Labels(top.indices, top.values, opinion.candidates, opinion.best, opinion.kl, entropy)
    return [each for each in labels if each is not None]


class LocalTeacher:
    """An LLM on this machine: one forward per batch of trajectories."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self.identity = ModelIdentity.of(model)

    def opinions(
        self, trajectories: Sequence[Trajectory], slm: Sequence[Tensor], candidates: Sequence[Tensor]
    ) -> list[Opinion]:
        """See ``Teacher``. Padding rows of either vocabulary are left out."""
        found = []
        for theirs, ours, ids in zip(along(self._model, trajectories), slm, candidates, strict=True):
            theirs = theirs.to(ours.device)
            width = min(theirs.shape[1], ours.shape[1])
            p = theirs[:, :width].exp()
            kl = (p * (theirs[:, :width] - ours[:, :width])).sum(-1).clamp_min(0)
            found.append(Opinion(theirs.gather(1, ids.clamp_max(width - 1)), theirs.argmax(-1), kl))
        return found


@torch.inference_mode()
def along(model: LanguageModel, trajectories: Sequence[Trajectory]) -> list[Tensor]:
    """Log-probabilities ``[n, V]`` of every completion step, one forward for all trajectories."""
    rows = [prompt + ids[:-1] for prompt, ids in trajectories]
    ids, mask = left_padded(rows, model.device)
    longest = max(len(completion) for _, completion in trajectories)
    logits, _ = model.read_rows(ids, mask, None, longest)
    return [logits[at, longest - len(completion) :].log_softmax(-1) for at, (_, completion) in enumerate(trajectories)]


def batches(lengths: Sequence[int], tokens: int = BATCH_TOKENS) -> Iterator[list[int]]:
    """Places of rows that go into one forward: alike in length, at most ``tokens`` with padding."""
    order = sorted(range(len(lengths)), key=lambda at: lengths[at])
    batch: list[int] = []
    for at in order:
        if batch and (len(batch) + 1) * lengths[at] > tokens:
            yield batch
            batch = []
        batch.append(at)
    if batch:
        yield batch
