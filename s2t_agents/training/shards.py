"""Rollouts on disk: safetensors shards and a manifest. A shard is there whole or not at all.

runs/demo/rollouts/
  manifest.json              models, prompts' hash, settings, how many shards
  shard-00000.safetensors    trajectories, flattened (see ``Shard``)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file, save
from torch import Tensor

from ..atomic_write import write_whole
from ..errors import ConfigError, InputError, ModelNotFound
from ..scheduling.language_model import LanguageModel
from .differences import differences

MANIFEST = "manifest.json"


class ModelIdentity(BaseModel):
    """Which model took part: its name is for people, the fingerprints decide."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    tokenizer_fingerprint: str
    weights_fingerprint: str

    @classmethod
    def of(cls, model: LanguageModel) -> ModelIdentity:
        """The identity of a loaded model."""
        return cls(
            name=model.name,
            tokenizer_fingerprint=model.tokenizer_fingerprint,
            weights_fingerprint=model.weights_fingerprint,
        )


class Manifest(BaseModel):
    """What a folder of rollouts was made from; two runs with equal manifests make equal shards."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = 1
    slm: ModelIdentity
    llm: ModelIdentity
    task: str
    prompts_hash: str
    items: int
    shards: int
    settings: dict[str, Any]


class CollectedFolder(Manifest):
    """A finished folder's manifest, with what servers were paid for it, and what is wrong with it.

    Attributes:
        served_usd: by all runs in the folder; None where nothing was on a server, or its price is unknown.
        served_tokens: read and written there, those from a prefix cache left out.
        verdict: where not one answer is right; None otherwise.
    """

    served_usd: Decimal | None = None
    served_tokens: int = 0
    verdict: str | None = None


@dataclass(frozen=True)
class Shard:
    """R trajectories with P prompt tokens and N completion tokens in all, one after the other.

    Attributes:
        prompt_ids: ``[P]``; trajectory r owns ``prompt_ends[r-1]:prompt_ends[r]``.
        prompt_ends: ``[R]``.
        ids: ``[N]`` completion tokens, end tokens included; owned by ``ends`` likewise.
        ends: ``[R]``.
        item: ``[R]``, place of the item in its task.
        right: ``[R]``, 1 where the answer that this trajectory is part of was right.
        candidates: ``[N, K]``, the SLM's best tokens at the step, best first.
        slm: ``[N, K]``, their log-probabilities under the SLM.
        llm: ``[N, K]``, and under the LLM.
        llm_best: ``[N]``, the LLM's own best token.
        kl: ``[N]``, KL(LLM || SLM) in nats.
        entropy: ``[N]``, of the SLM, in nats.
    """

    prompt_ids: Tensor
    prompt_ends: Tensor
    ids: Tensor
    ends: Tensor
    item: Tensor
    right: Tensor
    candidates: Tensor
    slm: Tensor
    llm: Tensor
    llm_best: Tensor
    kl: Tensor
    entropy: Tensor

    def __len__(self) -> int:
        return len(self.ends)

    def trajectories(self) -> Iterator[tuple[list[int], list[int], slice]]:
        """Prompt ids, completion ids, and where the completion's steps lie in the flat tensors."""
        prompt_from = step_from = 0
        for prompt_to, step_to in zip(self.prompt_ends.tolist(), self.ends.tolist(), strict=True):
            steps = slice(step_from, step_to)
            yield self.prompt_ids[prompt_from:prompt_to].tolist(), self.ids[steps].tolist(), steps
            prompt_from, step_from = prompt_to, step_to


def shard_file(folder: Path, number: int) -> Path:
    """Where a shard lies."""
    return folder / f"shard-{number:05d}.safetensors"


def write_shard(folder: Path, number: int, shard: Shard) -> None:
    """Write it beside its place, then move it there: a killed run leaves no half shard.

    Raises:
        S2TError: the disk is full or not writable; earlier shards stand.
    """
    data = save({each.name: getattr(shard, each.name).contiguous() for each in fields(shard)})
    write_whole(shard_file(folder, number), data)


def missing_shards(folder: Path, manifest: Manifest) -> list[int]:
    """Numbers of the shards that are still to be made."""
    return [number for number in range(manifest.shards) if not shard_file(folder, number).exists()]


def open_folder(folder: Path, manifest: Manifest) -> None:
    """Begin or continue a folder of rollouts.

    Raises:
        ConfigError: the folder holds rollouts of other models, prompts or settings, or of unknown ones.
        S2TError: it cannot be written.
    """
    made = any(folder.glob("shard-*.safetensors"))
    if made and not (folder / MANIFEST).exists():
        raise ConfigError(
            f"{folder} holds shards, but {MANIFEST} is missing: nobody knows what they were made from.",
            hint="Collect into another folder, or delete this one.",
        )
    if made and (differing := differences(*(_deciding(each) for each in (read_manifest(folder), manifest)))):
        raise ConfigError(
            f"{folder} holds rollouts made with other settings: {differing}.",
            hint=f"Put them back, give another `out`, or move that folder away: mv {folder} {folder}-before.",
        )
    if not made:
        write_whole(folder / MANIFEST, (manifest.model_dump_json(indent=2) + "\n").encode())


def _deciding(manifest: Manifest) -> dict[str, Any]:
    return manifest.model_dump(mode="json", exclude={"shards"})  # which follows from the others


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises:
        ModelNotFound: there is none.
        InputError: it cannot be read.
    """
    file = folder / MANIFEST
    if not file.is_file():
        here = "" if folder.is_absolute() else f" A relative `out` starts at the working directory, {Path.cwd()}."
        raise ModelNotFound(
            f"no rollouts at {str(folder)!r}: {MANIFEST} is missing.", hint=f"Run `s2t collect` first.{here}"
        )
    try:
        return Manifest.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, ValidationError) as error:
        raise InputError(f"{file} is no manifest: {str(error).splitlines()[0]}.") from error


def read_shards(folder: Path) -> list[Shard]:
    """All shards of a finished folder, in order.

    Raises:
        InputError: some are missing (the collection did not finish) or cannot be read.
    """
    manifest = read_manifest(folder)
    missing = missing_shards(folder, manifest)
    if missing:
        raise InputError(
            f"{folder} is unfinished: {len(missing)} of {manifest.shards} shards are missing.",
            hint="Run the same `s2t collect` again; it continues where it stopped.",
        )
    return [_read_shard(shard_file(folder, number)) for number in range(manifest.shards)]


def _read_shard(file: Path) -> Shard:
    try:
        tensors: dict[str, torch.Tensor] = load_file(file)
        return Shard(**tensors)
    except Exception as error:
        raise InputError(f"{file} is not a readable shard: {error}.", hint="Delete it and collect again.") from error
