"""What a selector is trained on: the critical steps of each trajectory, with the candidates and what the LLM thinks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..backends.completions.backend import UNKNOWN_WEIGHTS
from ..backends.fingerprint import same_weights
from ..backends.statistics import FLOOR
from ..errors import ConfigError, InputError
from ..scheduling.language_model import LanguageModel
from .labels import Trajectory, along
from .shards import ModelIdentity, Shard, read_manifest, read_shards

CHECKED = 64
ALIKE = 0.9
"""Steps, and the share of them: quantised, a model still ranks so many alike."""


@dataclass(frozen=True)
class Example:
    """One trajectory and its M critical steps.

    Attributes:
        ids: prompt and completion tokens, the last one left out (nothing follows it).
        item: name of the prompt it answers, the same in every collection of the same prompts.
        positions: ``[M]``: tokens before each step.
        candidates: ``[M, K]`` token ids.
        slm: ``[M, K]`` log-probabilities of the SLM.
        llm: ``[M, K]`` and of the LLM.
        all_positions: ``[n]``: tokens before each step of the completion, critical or not.
        differs: ``[n]`` bool: at these the LLM's best token is not the SLM's.
        entropy: ``[n]`` of the SLM, in nats.
    """

    ids: list[int]
    item: str
    positions: Tensor
    candidates: Tensor
    slm: Tensor
    llm: Tensor
    all_positions: Tensor
    differs: Tensor
    entropy: Tensor


def read_for(slm: LanguageModel, folders: Sequence[Path], k: int) -> list[tuple[str, Shard]]:
    """All shards of some folders, each with the hash of its prompts.

    Raises:
        ConfigError: rollouts of another model, or with fewer candidates than wanted.
        ModelNotFound, InputError: see ``read_shards``.
    """
    found = []
    for folder in folders:
        manifest = read_manifest(folder)
        ours, theirs = ModelIdentity.of(slm), manifest.slm.weights_fingerprint
        unknown = theirs.startswith(UNKNOWN_WEIGHTS)
        same = unknown or same_weights(theirs, ours.weights_fingerprint)
        if not same or manifest.slm.tokenizer_fingerprint != ours.tokenizer_fingerprint:
            raise ConfigError(
                f"{folder} holds rollouts of {manifest.slm.name!r} with other weights than {slm.name!r} has now.",
                hint="Collect again with the present weights.",
            )
        shards = read_shards(folder)
        if unknown:
            _check_alike(slm, folder, shards)
        kept = min(shard.candidates.shape[1] for shard in shards)
        if kept < k:
            raise ConfigError(f"k is {k}, but {folder} keeps {kept} candidates.", hint="Collect with a larger k.")
        found += [(manifest.prompts_hash, shard) for shard in shards]
    return found


def _check_alike(slm: LanguageModel, folder: Path, shards: Sequence[Shard]) -> None:
    """Compare a model with rollouts of a server, which does not say what weights it has.

    Raises:
        ConfigError: on the first ``CHECKED`` steps they seldom rank the candidates alike.
    """
    trajectories: list[Trajectory] = []
    ranked: list[Tensor] = []
    for shard in shards:
        for prompt, ids, steps in shard.trajectories():
            if sum(map(len, ranked)) < CHECKED:
                candidates, values = shard.candidates[steps][:CHECKED].long(), shard.slm[steps][:CHECKED]
                trajectories.append((prompt, ids[:CHECKED]))
                ranked.append(candidates.where(values > FLOOR, candidates[:, :1]))  # of the legal ones
    if not trajectories:
        return
    said = [
        log_probs.gather(1, ids.to(log_probs.device))
        for log_probs, ids in zip(along(slm, trajectories), ranked, strict=True)
    ]
    first = [values[:, 0] >= values.amax(-1) for values in said]
    alike = float(torch.cat(first).float().mean())
    if alike < ALIKE:
        raise ConfigError(
            f"{folder} holds rollouts of a server whose model is not {slm.name!r}: of {sum(map(len, first))} steps they"
            f" rank the same candidate first at {alike:.0%}, and {ALIKE:.0%} are wanted.",
            hint="Serve the checkpoint that is trained, and collect again.",
        )


def threshold_for(values: Tensor, rate: float) -> float:
    """The value that a share ``rate`` of ``values`` ``[N]`` reaches; where equal ones do not allow it, the nearest."""
    if rate >= 1:
        return float("-inf")
    ordered = values.float().sort(descending=True).values
    wanted = max(1, round(rate * len(ordered)))
    found = ordered[min(len(ordered), wanted) - 1]
    above = ordered[ordered > found]
    if len(above) and wanted - len(above) < int((ordered >= found).sum()) - wanted:
        return float(above[-1])
    return float(found)


def choose(shards: Sequence[tuple[str, Shard]], *, k: int, rate: float, kl_rate: float) -> list[Example]:
    """The examples of these shards: steps of the highest entropy, and besides those where the models differ most.

    Args:
        shards: with the hash of their prompts.
        k: candidates per step.
        rate: share of steps by entropy.
        kl_rate: share of steps by KL.

    Raises:
        InputError: no step at all.
    """
    if not sum(len(shard.ids) for _, shard in shards):
        raise InputError("the rollouts hold no steps.", hint="Collect with more items, or other prompts.")
    spread = threshold_for(torch.cat([shard.entropy for _, shard in shards]), rate)
    far = threshold_for(torch.cat([shard.kl for _, shard in shards]), kl_rate) if kl_rate else float("inf")
    examples = []
    for prompts, shard in shards:
        critical = (shard.entropy >= spread) | (shard.kl >= far)
        for row, (prompt, ids, steps) in enumerate(shard.trajectories()):
            at = critical[steps].nonzero()[:, 0]
            before = len(prompt) + torch.arange(len(ids))
            examples.append(
                Example(
                    ids=prompt + ids[:-1],
                    item=f"{prompts}/{int(shard.item[row])}",
                    positions=before[at],
                    candidates=shard.candidates[steps][at, :k].long(),
                    slm=shard.slm[steps][at, :k],
                    llm=shard.llm[steps][at, :k],
                    all_positions=before,
                    differs=shard.llm_best[steps] != shard.candidates[steps][:, 0],
                    entropy=shard.entropy[steps],
                )
            )
    return examples


def split(examples: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Examples to train on and to validate on, by prompt: all answers to one prompt are on the same side."""
    train: list[Example] = []
    validation: list[Example] = []
    for example in examples:
        lot = int.from_bytes(hashlib.sha256(example.item.encode()).digest()[:4]) / 2**32
        (validation if lot < share else train).append(example)
    return train, validation
