"""A model's logits at every step of given answers, on any backend, read through its scheduler.

prompt, as far as the prefix cache has not got it ──> a fork for each of its answers ──a token of each in one forward──>
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..backends.base import SequenceCache, StepOutput
from ..scheduling.language_model import LanguageModel
from ..scheduling.requests import AppendRequest

Trajectory = tuple[Sequence[int], Sequence[int]]
"""Prompt ids and completion ids."""


@torch.inference_mode()
def outputs_along(
    model: LanguageModel, trajectories: Sequence[Trajectory], keep: Callable[[StepOutput], Tensor]
) -> list[Tensor]:
    """What is kept of the output before each of the n tokens of every completion, ``[n, ...]`` each.

    Args:
        model: reads, a token at a time, as it writes answers.
        trajectories: completions of at least one token.
        keep: what of an output is wanted.

    Raises:
        Overloaded: longer than the model's KV has room for.
    """
    together = max(1, model.backend.limits.sequences // 2)  # each has a cache, and so has its prompt
    found: list[Tensor] = []
    for first in range(0, len(trajectories), together):
        found += _read(model, trajectories[first : first + together], keep)
    return found


def _read(
    model: LanguageModel, trajectories: Sequence[Trajectory], keep: Callable[[StepOutput], Tensor]
) -> list[Tensor]:
    prompts: dict[tuple[int, ...], SequenceCache] = {}
    caches: list[SequenceCache] = []
    try:
        unread = []
        for ids in dict.fromkeys(tuple(prompt) for prompt, _ in trajectories):
            kept, length = model.prefix_cache.match(ids)  # an answer that was just made
            prompts[ids] = model.new_cache() if kept is None else kept
            unread.append((prompts[ids], ids[length:]))
        after = dict(zip(prompts, _append(model, unread), strict=True))
        found = [[keep(after[tuple(prompt)])] for prompt, _ in trajectories]
        for prompt, _ in trajectories:
            caches.append(prompts[tuple(prompt)].fork(len(prompt)))
        for at in range(max(len(ids) for _, ids in trajectories) - 1):
            going = [row for row, (_, ids) in enumerate(trajectories) if at + 1 < len(ids)]
            outputs = _append(model, [(caches[row], trajectories[row][1][at : at + 1]) for row in going])
            for row, output in zip(going, outputs, strict=True):
                found[row].append(keep(output))
    finally:
        for cache in [*caches, *prompts.values()]:
            cache.close()
    return [torch.stack(each) for each in found]


def _append(model: LanguageModel, tokens: Sequence[tuple[SequenceCache, Sequence[int]]]) -> list[StepOutput]:
    """Some tokens to each of these caches, in shared forwards."""
    requests = [AppendRequest(torch.tensor(list(ids)), cache) for cache, ids in tokens]
    model.scheduler.run(requests)
    return [request.result() for request in requests]
