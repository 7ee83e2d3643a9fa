"""Rollouts in bulk: the SLM answers, the LLM reads each answer once and is remembered at every step.

items ──batch──> SLM answers (greedy, sampled, or corrected by a selector) ──> both models read them ──> one shard
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from ..atomic_write import sole_run
from ..backends.completions.backend import CompletionsBackend
from ..backends.fingerprint import shared_ids
from ..budget import Budget
from ..endpoints.spending import Spending
from ..engine.engine import Engine
from ..errors import ConfigError, S2TError
from ..scheduling.admission import Concurrency
from ..scheduling.language_model import LanguageModel
from ..scheduling.waits import gather
from ..selectors import LocalSelector, SelectorConfig, load_selector
from ..selectors.config import CONFIG_FILE
from ..triggers import entropy
from ..types import Sampling
from .byte_teacher import ByteTeacher
from .config import CollectConfig, Models, Rollouts
from .crew import Crew
from .dialogue import AnsweredItem, Speaker, answering, check_prompts
from .labels import Labels, LocalTeacher, Teacher, label
from .progress import HIDDEN, Bar, bar, counted
from .served_costs import CollectingRun
from .settings import ServedPrice
from .shards import MANIFEST, Manifest, ModelIdentity, Shard, missing_shards, open_folder, read_manifest, write_shard
from .tasks import Item, Task, prompts_hash


def collect(config: CollectConfig, crew: Crew | None = None, *, usd: Decimal | None = None) -> Path:
    """Make a folder of labelled rollouts, or finish one that was begun.

    A shard is a function of the manifest and its number alone: however often the run was killed, and however many
    processes made it, the folder ends the same, byte for byte; with a model on a server, as far as that one repeats
    itself.

    Args:
        config: see there.
        crew: makes the shards; this process by default.
        usd: the most that this run may cost on servers; None sets no limit.

    Returns:
        The manifest's path.

    Raises:
        InputError: prompts that cannot be used.
        TokenizerMismatch: see ``open_teacher``.
        ConfigError: the folder holds other rollouts.
        FolderInUse: another run fills it now.
        BudgetExceeded: ``usd`` is used up; whole shards are kept, and the next run goes on.
        UnpricedModel: ``usd``, and a server of unknown price.
        ModelServerError, EscalationFailed: the SLM's server, or the LLM's, gives no usable answer.
        S2TError: the disk is full, or a model gives no numbers; whole shards are kept.
    """
    if not config.rollouts.greedy and not config.rollouts.samples:
        raise ConfigError("collect makes no rollouts: greedy is off and samples is 0.")
    crew = crew or Crew()
    run = CollectingRun.of(config.models, config.out, usd)
    with sole_run(config.out):  # a folder that cannot be written is told before the models are loaded
        collector = _open(config, run)
        collector.finish(None if crew.count == 1 else partial(crew.each, partial(_make, config, run)))
    return config.out / MANIFEST


def collect_with(slm: LanguageModel, teacher: Teacher, task: Task, settings: Rollouts, out: Path) -> None:
    """``collect`` on models that are loaded already."""
    with sole_run(out):
        Collector(slm, teacher, task, settings, out).finish()


SERVED_RUNNING = 32
"""Answers at a time of an SLM on a server: each has a connection."""

SHARDS = 8
"""Of few prompts, so that an interruption costs an eighth of the work."""
SMALLEST, LARGEST = 4, 128
"""Items of a shard where none is set: fewer make the forwards dearer, more lose too much. With a server it has
``SERVED_RUNNING`` at least."""


class Collector:
    """Makes the shards of one folder."""

    def __init__(self, slm: LanguageModel, teacher: Teacher, task: Task, settings: Rollouts, out: Path) -> None:
        self._slm, self._teacher, self._task, self._settings, self._out = slm, teacher, task, settings, out
        self._policy = load_selector(settings.selector, slm) if settings.selector else None
        self._speaker = Speaker(slm)

    def finish(self, each: Callable[[Sequence[int]], Iterable[int]] | None = None) -> None:
        """Make what is not there yet.

        Args:
            each: makes the shards of these numbers elsewhere, and gives each one's answers as it is done; None makes
                them here.
        """
        size, items = self._shard_items(), self._task.items
        manifest = Manifest(
            slm=ModelIdentity.of(self._slm),
            llm=self._teacher.identity,
            task=self._task.name,
            prompts_hash=prompts_hash(self._task),
            items=len(items),
            shards=-(-len(items) // size),
            settings=_settings_of(self._settings.model_copy(update={"shard_items": size})),
        )
        todo = missing_shards(self._out, manifest)
        asked = [item for number in todo for item in items[number * size : (number + 1) * size]]
        check_prompts(self._speaker, asked)
        open_folder(self._out, manifest)
        answers = len(asked) * (self._settings.greedy + self._settings.samples)
        with bar(f"collect {self._task.name}: answers, and their labels", 2 * answers) as progress:
            for made in each(todo) if each else (self.make(number, progress) for number in todo):
                progress.advance(2 * made if each else 0)

    def _shard_items(self) -> int:
        """Items of a shard: of a collection that was begun its own, else as set, else few of few."""
        if any(self._out.glob("shard-*.safetensors")) and (self._out / MANIFEST).exists():
            return int(read_manifest(self._out).settings["shard_items"])
        served = self._slm.library == "server" or not isinstance(self._teacher, LocalTeacher | ByteTeacher)
        least = SERVED_RUNNING if served else SMALLEST
        return self._settings.shard_items or max(least, min(LARGEST, -(-len(self._task.items) // SHARDS)))

    def make(self, number: int, progress: Bar = HIDDEN) -> int:
        """Make and write one shard of a folder that was opened; returns how many answers it holds."""
        size = int(read_manifest(self._out).settings["shard_items"])
        first = number * size
        answers = self._answers(self._task.items[first : first + size], progress)
        write_shard(self._out, number, self._labelled(answers, first, progress))
        return len(answers)

    def _answers(self, items: Sequence[Item], progress: Bar) -> list[AnsweredItem]:
        """Every pass over these items, all passes together; each drawn answer from a seed of its item and sample."""
        settings, slm = self._settings, self._slm
        rows = len(items) * (settings.samples + 1)
        running = rows if not slm.capabilities.concurrent_forwards else min(rows, SERVED_RUNNING)
        engine = Engine(slm, concurrency=Concurrency(running=running, waiting=rows, wait_s=math.inf))
        passes: list[tuple[Engine, int | None]] = [(engine, sample) for sample in range(settings.samples)]
        if settings.greedy:
            passes.insert(0, (engine if self._policy is None else _corrected(slm, self._policy, len(items)), None))

        def sampling(item: Item, sample: int | None, prompt: Sequence[int]) -> Sampling:
            if sample is None:
                return Sampling(max_tokens=settings.max_tokens)
            seed = row_seed(settings.seed, item.id, sample, len(prompt))
            return Sampling(max_tokens=settings.max_tokens, temperature=settings.temperature, seed=seed)

        slm.prefix_cache.clear()  # a shard depends on nothing that was before it
        return gather(
            [
                counted(answering(self._speaker, self._task, item, engine, partial(sampling, item, sample)), progress)
                for engine, sample in passes
                for item in items
            ]
        )

    def _labelled(self, answers: Sequence[AnsweredItem], first: int, progress: Bar) -> Shard:
        """The shard of these answers; ``first`` is the place of the shard's first item."""
        place = {answer.item.id: first + at for at, answer in reversed(list(enumerate(answers)))}
        trajectories = [
            (prompt, trace.ids)
            for answer in answers
            for prompt, trace in zip(answer.prompts, answer.traces, strict=True)
        ]
        owners = [answer for answer in answers for _ in answer.traces]
        grammars = [
            self._speaker.grammar(answer.item, prompt, self._settings.max_tokens)
            for answer in answers
            for prompt in answer.prompts
        ]
        conversations = [conversation for answer in answers for conversation in answer.conversations]
        last_turns = set(accumulate(len(answer.traces) for answer in answers))

        def done(batch: Sequence[int]) -> None:
            progress.advance(sum(at + 1 in last_turns for at in batch))

        labels = label(self._slm, self._teacher, trajectories, self._settings.k, grammars, conversations, done)
        _check_numbers(self._slm, self._teacher, labels)

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
            right=torch.tensor([self._task.grade(answer.item, answer.text) for answer in owners], dtype=torch.uint8),
            candidates=flat("candidates", torch.int32),
            slm=flat("slm", torch.float32),
            llm=flat("llm", torch.float32),
            llm_best=flat("llm_best", torch.int32),
            kl=flat("kl", torch.float32),
            entropy=flat("entropy", torch.float32),
        )


def _open(config: CollectConfig, run: CollectingRun | None) -> Collector:
    task = config.task.open()
    models = config.models
    if config.rollouts.dtype is not None:
        models = models.model_copy(update={"dtype": config.rollouts.dtype})
    budget = None if run is None else run.budget()
    slm = models.load_slm_to_collect()
    if budget is not None and isinstance(slm.backend, CompletionsBackend):
        slm.backend.spending = _spending(budget, models.slm_price)
    return Collector(slm, open_teacher(models, slm, budget), task, config.rollouts, config.out)


_opened = lru_cache(maxsize=1)(_open)
"""Once per process of a crew, however many shards it makes; a process that lives on would miss changed files."""


def _make(config: CollectConfig, run: CollectingRun | None, number: int) -> int:
    """One shard, in a crew's process."""
    return _opened(config, run).make(number)


def open_teacher(models: Models, slm: LanguageModel, budget: Budget | None = None) -> Teacher:
    """The LLM that labels: local, or on a server, paid from ``budget``.

    Raises:
        TokenizerMismatch: its ids mean other tokens than the SLM's, and it is on a server, or its tokenizer cannot be
            followed byte by byte.
    """
    if models.llm_server is not None:
        from .remote import RemoteTeacher

        return RemoteTeacher(
            models.llm_server,
            models.llm,
            slm,
            tokenizer=models.llm_tokenizer,
            api_key_env=models.llm_key_env,
            spending=None if budget is None else _spending(budget, models.llm_price),
        )
    llm = models.load_llm()
    return ByteTeacher(llm, slm) if shared_ids(slm.tokenizer, llm.tokenizer) else LocalTeacher(llm)


def _spending(budget: Budget, price: ServedPrice | None) -> Spending:
    return Spending(budget, None if price is None else price.of_tokens())


def row_seed(*parts: object) -> int:
    """A seed of its own for each row, whatever batch it is in."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7])


def _settings_of(rollouts: Rollouts) -> dict[str, Any]:
    """All of them that decide the rollouts; a dtype that was not set is left out, as in older folders."""
    plain = rollouts.model_dump(mode="json", exclude={"dtype"} if rollouts.dtype is None else None)
    return {**plain, "selector": selector_digest(rollouts.selector)}


def selector_digest(selector: Path | None) -> str | None:
    """Of a selector's files: another training under the same name makes other rollouts."""
    if selector is None:
        return None
    digest = hashlib.sha256()
    for file in sorted([*selector.glob("*.safetensors"), selector / CONFIG_FILE]):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _corrected(slm: LanguageModel, policy: tuple[LocalSelector, SelectorConfig], running: int) -> Engine:
    selector, config = policy
    if config.calibration is None:
        raise ConfigError("the selector for an on-policy round has no thresholds.", hint="Run `s2t calibrate` first.")
    trigger = entropy(above=config.calibration.trigger_entropy)
    return Engine(slm, k=config.k, trigger=trigger, selector=selector, concurrency=Concurrency(running=running))


def _check_numbers(slm: LanguageModel, teacher: Teacher, labels: Sequence[Labels]) -> None:
    for who, name in (("slm", slm.name), ("llm", teacher.identity.name)):
        if any(torch.isnan(getattr(each, who)).any() for each in labels):
            raise S2TError(
                f"{name!r} gives log-probabilities that are no numbers (NaN); this shard was not written.",
                hint="Shards before it are kept. Take another dtype: float16 overflows in some models.",
            )
