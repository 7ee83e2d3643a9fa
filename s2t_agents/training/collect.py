"""Rollouts in bulk: the SLM answers, the LLM reads each answer once and is remembered at every step.

items ──batch──> SLM answers (greedy, sampled, or corrected by a selector) ──> both models read them ──> one shard
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import ConfigError, S2TError, TokenizerMismatch
from ..models.fingerprint import shared_ids
from ..models.language_model import LanguageModel
from ..selectors import LocalSelector, SelectorConfig, load_selector
from ..selectors.config import CONFIG_FILE
from .config import CollectConfig, Models, Rollouts
from .deciders import Corrected, Greedy, Local, Sampled, entropy_above
from .dialogue import Answer, MakeDecider, Speaker, converse
from .labels import Labels, LocalTeacher, Teacher, label
from .progress import bar
from .scorers import scorer_for
from .shards import MANIFEST, Manifest, ModelIdentity, Shard, open_folder, write_shard
from .tasks import Item, Task, prompts_hash


def collect(config: CollectConfig) -> Path:
    """Make a folder of labelled rollouts, or finish one that was begun.

    A shard is a function of the manifest and its number alone: however often the run was killed, the folder ends the
    same, byte for byte.

    Returns:
        The manifest's path.

    Raises:
        InputError: prompts that can not be used.
        TokenizerMismatch: SLM and LLM do not share ids.
        ConfigError: the folder holds other rollouts.
        S2TError: the disk is full, or a model gives no numbers; whole shards are kept.
    """
    if not config.rollouts.greedy and not config.rollouts.samples:
        raise ConfigError("collect makes no rollouts: greedy is off and samples is 0.")
    task = config.task.open()
    slm = config.models.load_slm()
    teacher = open_teacher(config.models, slm)
    collect_with(slm, teacher, task, config.rollouts, config.out)
    return config.out / MANIFEST


def collect_with(slm: LanguageModel, teacher: Teacher, task: Task, settings: Rollouts, out: Path) -> None:
    """``collect`` on models that are loaded already."""
    policy = load_selector(settings.selector, slm) if settings.selector else None
    size = settings.shard_items
    manifest = Manifest(
        slm=ModelIdentity.of(slm),
        llm=teacher.identity,
        task=task.name,
        prompts_hash=prompts_hash(task),
        items=len(task.items),
        shards=-(-len(task.items) // size),
        settings={**settings.model_dump(mode="json"), "selector": _digest(settings.selector)},
    )
    todo = open_folder(out, manifest)
    speaker = Speaker(slm)
    left = sum(min(size, len(task.items) - number * size) for number in todo)
    with bar(f"collect {task.name}", left) as progress:
        for number in todo:
            items = task.items[number * size : (number + 1) * size]
            answers = _answers(speaker, task, items, settings, policy)
            write_shard(out, number, _labelled(slm, teacher, task, answers, number * size, settings.k))
            progress.advance(len(items))


def open_teacher(models: Models, slm: LanguageModel) -> Teacher:
    """The LLM that labels: local, or behind a vLLM server.

    Raises:
        TokenizerMismatch: its ids mean other tokens than the SLM's.
    """
    if models.llm_server is not None:
        from .remote import RemoteTeacher

        return RemoteTeacher(models.llm_server, models.llm, slm, tokenizer=models.llm_tokenizer)
    llm = models.load_llm()
    check_same_ids(slm, llm)
    return LocalTeacher(llm)


def check_same_ids(slm: LanguageModel, llm: LanguageModel) -> None:
    """Refuse a pair whose token ids differ.

    Raises:
        TokenizerMismatch: naming the first token that differs.
    """
    differing = shared_ids(slm.tokenizer, llm.tokenizer)
    if differing:
        raise TokenizerMismatch(
            f"{llm.name!r} and {slm.name!r} disagree on {len(differing)} token ids, {differing[0]!r} first.",
            hint="Take an LLM of the same family.",
        )


def row_seed(*parts: object) -> int:
    """A seed of its own for each row, whatever batch it is in."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7])


def _digest(selector: Path | None) -> str | None:
    """Of a selector's files: another training under the same name makes other rollouts."""
    if selector is None:
        return None
    digest = hashlib.sha256()
    for file in sorted([*selector.glob("*.safetensors"), selector / CONFIG_FILE]):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _answers(
    speaker: Speaker,
    task: Task,
    items: Sequence[Item],
    settings: Rollouts,
    policy: tuple[LocalSelector, SelectorConfig] | None,
) -> list[Answer]:
    """Every pass over these items."""
    passes: list[MakeDecider] = [_corrected(policy)] if settings.greedy else []
    passes += [_drawn(items, settings, at) for at in range(settings.samples)]
    return [answer for make in passes for answer in converse(speaker, task, items, make, settings.max_tokens)]


def _corrected(policy: tuple[LocalSelector, SelectorConfig] | None) -> MakeDecider:
    if policy is None:
        return lambda prompts, rows: Greedy()
    selector, config = policy
    if config.calibration is None:
        raise ConfigError("the selector for an on-policy round has no thresholds.", hint="Run `s2t calibrate` first.")
    condition = entropy_above(config.calibration.trigger_entropy)
    return lambda prompts, rows: Corrected(condition, Local(scorer_for(selector, prompts)), config.k)


def _drawn(items: Sequence[Item], settings: Rollouts, sample: int) -> MakeDecider:
    def make(prompts: list[list[int]], rows: list[int]) -> Sampled:
        seeds = [
            row_seed(settings.seed, items[row].id, sample, len(prompt))
            for row, prompt in zip(rows, prompts, strict=True)
        ]
        return Sampled(settings.temperature, seeds, settings.max_tokens)

    return make


def _check_numbers(slm: LanguageModel, teacher: Teacher, labels: Sequence[Labels]) -> None:
    for who, name in (("slm", slm.name), ("llm", teacher.identity.name)):
        if any(torch.isnan(getattr(each, who)).any() for each in labels):
            raise S2TError(
                f"{name!r} gives log-probabilities that are no numbers (NaN); this shard was not written.",
                hint="Shards before it are kept. Take another dtype: float16 overflows in some models.",
            )


def _labelled(slm: LanguageModel, teacher: Teacher, task: Task, answers: Sequence[Answer], first: int, k: int) -> Shard:
    """The shard of these answers; ``first`` is the place of the shard's first item."""
    place = {answer.item.id: first + at for at, answer in reversed(list(enumerate(answers)))}
    trajectories = [
        (prompt, trace.ids) for answer in answers for prompt, trace in zip(answer.prompts, answer.traces, strict=True)
    ]
    owners = [answer for answer in answers for _ in answer.traces]
    labels = label(slm, teacher, trajectories, k)
    _check_numbers(slm, teacher, labels)

    def flat(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.cat([getattr(each, name) for each in labels]).to("cpu", dtype)

    def ends(lists: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor([len(each) for each in lists]).cumsum(0)

    prompts, completions = [prompt for prompt, _ in trajectories], [ids for _, ids in trajectories]
    return Shard(
        prompt_ids=torch.tensor([token for prompt in prompts for token in prompt], dtype=torch.int32),
        prompt_ends=ends(prompts),
        ids=torch.tensor([token for ids in completions for token in ids], dtype=torch.int32),
        ends=ends(completions),
        item=torch.tensor([place[answer.item.id] for answer in owners]),
        right=torch.tensor([task.grade(answer.item, answer.text) for answer in owners], dtype=torch.uint8),
        candidates=flat("candidates", torch.int32),
        slm=flat("slm", torch.float32),
        llm=flat("llm", torch.float32),
        llm_best=flat("llm_best", torch.int32),
        kl=flat("kl", torch.float32),
        entropy=flat("entropy", torch.float32),
    )
