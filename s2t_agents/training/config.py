"""Settings of every stage, and the one TOML file that holds them all. See ``s2t_agents/demo/selector.toml``."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import ConfigError
from ..models.bundled import model_path
from ..models.language_model import LanguageModel
from .tasks import TaskConfig

Kind = Literal["head", "activated", "published"]
KINDS: tuple[Kind, ...] = ("head", "activated", "published")
"""From the cheapest to the dearest to train."""
Part = Literal["train", "heldout", "again"]
Model = TypeVar("Model", bound=BaseModel)


class Settings(BaseModel):
    """Base: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Models(Settings):
    """The pair.

    Attributes:
        slm: path, hub id or bundled name.
        llm: likewise; with ``llm_server`` the name that the server knows it by.
        llm_server: base URL of an OpenAI-compatible vLLM server, such as ``http://localhost:8000/v1``.
        llm_tokenizer: path or hub id of the LLM's tokenizer when it is served; by default ``llm``.
        device: None takes the best there is.
        dtype: None takes fp32 for small models on a CPU, the checkpoint's own otherwise.
    """

    slm: str = "s2t-demo"
    llm: str = "s2t-demo-llm"
    llm_server: str | None = None
    llm_tokenizer: str | None = None
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    def load_slm(self) -> LanguageModel:
        """The small model; errors as ``LanguageModel.load``."""
        return self._load(self.slm)

    def load_llm(self) -> LanguageModel:
        """The large model, on this machine."""
        return self._load(self.llm)

    def _load(self, name: str) -> LanguageModel:
        dtype = getattr(torch, self.dtype) if self.dtype else None
        model = LanguageModel.load(model_path(name), device=self.device, dtype=dtype)
        model.name = name
        return model


class Rollouts(Settings):
    """``[collect]``: how rollouts are made.

    Attributes:
        k: candidates kept per step.
        greedy: one greedy rollout per item.
        samples: so many sampled rollouts per item besides.
        temperature: of the sampled ones.
        max_tokens: per turn.
        shard_items: items per shard, and per batch.
        seed: of the draws.
        selector: directory of a selector that corrects the greedy rollouts (an on-policy round).
    """

    k: int = Field(default=16, ge=1, le=64)
    greedy: bool = True
    samples: int = Field(default=0, ge=0)
    temperature: float = Field(default=0.8, gt=0)
    max_tokens: int = Field(default=160, ge=1)
    shard_items: int = Field(default=128, ge=1)
    seed: int = 0
    selector: Path | None = None


class CollectConfig(Settings):
    """One collection: which models, which prompts, where to."""

    models: Models
    task: TaskConfig
    out: Path
    rollouts: Rollouts = Rollouts()


class Adapter(Settings):
    """LoRA of the activated and the published kind."""

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16, gt=0)
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Fit(Settings):
    """``[train]``: how a selector is trained.

    Attributes:
        k: candidates that it will rank; at most the rollouts' k.
        rate: share of steps, by entropy, that are trained on.
        kl_rate: share of steps, by KL, that are trained on besides.
        epochs: passes over the training trajectories, at most.
        lr: peak learning rate (cosine to zero after ``warmup`` steps).
        weight_decay: of AdamW.
        batch: steps' groups per optimiser step (head), or trajectories (adapters), gradient accumulation included.
        warmup: optimiser steps.
        clip: of the gradient's norm.
        soft: weight of the soft term beside the cross-entropy.
        label_temperature: of the LLM's distribution in the soft term.
        width: of the head's hidden layer.
        adapter: LoRA of the other kinds.
        max_row: candidates in one forward; longer rows are split, their gradients added.
        bf16: autocast.
        checkpointing: activations of the adapters' layers are computed again in the backward pass instead of kept:
            less memory for one more forward pass, the same weights. The head has none to keep.
        validation: share of items held back for early stopping.
        evaluate_every: optimiser steps between looks at them; checkpoints are written then.
        patience: looks without a better agreement before training stops.
        seed: of initialisation and order.
    """

    k: int = Field(default=8, ge=1, le=64)
    rate: float = Field(default=0.1, gt=0, le=1)
    kl_rate: float = Field(default=0.02, ge=0, le=1)
    epochs: int = Field(default=3, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    batch: int = Field(default=16, ge=1)
    warmup: int = Field(default=20, ge=0)
    clip: float = Field(default=1.0, gt=0)
    soft: float = Field(default=0.5, ge=0)
    label_temperature: float = Field(default=1.0, gt=0)
    width: int = Field(default=256, ge=1)
    adapter: Adapter = Adapter()
    max_row: int = Field(default=512, ge=1)
    bf16: bool = False
    checkpointing: bool = False
    validation: float = Field(default=0.08, gt=0, lt=1)
    evaluate_every: int = Field(default=50, ge=1)
    patience: int = Field(default=6, ge=1)
    seed: int = 0


class TrainConfig(Settings):
    """One selector: its kind, its rollouts, files of paid selections to learn from besides, where to."""

    models: Models
    kind: Kind
    rollouts: tuple[Path, ...]
    paid: tuple[Path, ...] = ()
    out: Path
    fit: Fit = Fit()


class Targets(Settings):
    """``[calibrate]``: the rates that thresholds are set to.

    Attributes:
        trigger_rate: share of all steps.
        escalation_rate: share of triggered steps.
        false_alarms: largest share of answers in which the LLM would change nothing and the selector does; sets the
            selector's caution. None leaves it at 0.
    """

    trigger_rate: float = Field(default=0.05, gt=0, lt=1)
    escalation_rate: float = Field(default=0.2, gt=0, lt=1)
    false_alarms: float | None = Field(default=None, gt=0, lt=1)


class CalibrateConfig(Settings):
    """A trained selector and held-out rollouts; ``seed`` is written down beside the figures."""

    models: Models
    selector: Path
    rollouts: Path
    targets: Targets = Targets()
    seed: int = 0


class Rows(Settings):
    """``[evaluate]``: which rows, at which settings.

    Attributes:
        trigger_rate: of the local rows, by entropy; None takes each selector's own calibrated trigger.
        llm_trigger_rate: of llm_select and takeover. All thresholds come from the selectors' calibration, on held-out
            rollouts, never from the problems of the table.
        budgets: escalations per answer of the hybrid rows.
        hybrid: kind of the selector in the hybrid and random rows; None takes the one with the best held-out agreement.
        votes: samples of the majority row.
        temperature: of those samples.
        ks: sweep over K; empty for none.
        rates: sweep over trigger rates; empty for none.
        k: candidates where no selector says.
        max_tokens: per turn.
        batch: problems in lockstep.
        agreement: problems on which the agreement with the LLM at triggered steps is measured.
        llm_usd_per_million: price of the LLM's tokens, for the cost column; None where nobody knows it.
        check: problems that are run again through ``Engine.steps``, one by one: are the answers the same, and how long
            do they take so?
    """

    trigger_rate: float | None = Field(default=None, gt=0, lt=1)
    llm_trigger_rate: float = Field(default=0.1, gt=0, lt=1)
    budgets: tuple[int, ...] = (1, 2, 4, 8)
    hybrid: Kind | None = None
    votes: int = Field(default=8, ge=1)
    temperature: float = Field(default=0.7, gt=0)
    ks: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    k: int = Field(default=8, ge=1, le=64)
    max_tokens: int = Field(default=160, ge=1)
    batch: int = Field(default=100, ge=1)
    agreement: int = Field(default=100, ge=0)
    llm_usd_per_million: float | None = Field(default=None, ge=0)
    check: int = Field(default=10, ge=0)


class EvaluateConfig(Settings):
    """One table.

    Attributes:
        models: the pair.
        task: the test problems.
        selectors: calibrated selector directories by kind.
        out: where the report and plots go; None writes none.
        rows: which rows.
        seed: of random triggers and votes.
    """

    models: Models
    task: TaskConfig
    selectors: dict[Kind, Path] = {}
    out: Path | None = None
    rows: Rows = Rows()
    seed: int = 0

    def __hash__(self) -> int:
        return hash((self.models, self.task, self.rows, self.seed))  # a dict of selectors has none


class ProbeConfig(Settings):
    """Local sufficiency on a folder of rollouts, the learned probe taken from a selector directory if given."""

    models: Models
    rollouts: Path
    selector: Path | None = None
    out: Path | None = None


class Tasks(Settings):
    """``[tasks.*]``: sets of prompts that share nothing.

    Attributes:
        train: to learn from.
        heldout: to calibrate on.
        test: for the table.
        again: for an on-policy round: answered with the first kind of ``[train.*]`` in charge, then learnt from too.
    """

    train: TaskConfig
    heldout: TaskConfig
    test: TaskConfig
    again: TaskConfig | None = None


class Pipeline(Settings):
    """The whole TOML file.

    Attributes:
        out: folder of everything that is made.
        models: the pair.
        tasks: what to train, calibrate and test on.
        collect: rollouts.
        paid: files that ``Escalation(record=...)`` wrote; every kind learns from them, beside the rollouts.
        train: per kind; kinds that are not there are not trained.
        calibrate: target rates.
        evaluate: the table.
        seed: of the table's draws.
        processes: that share collecting, training and evaluating, each with models of its own and its part of the
            threads; their number decides nothing else. For small models on a CPU: on a GPU, or where memory is short,
            leave it at 1.
    """

    out: Path
    models: Models = Models()
    tasks: Tasks
    collect: Rollouts = Rollouts()
    paid: tuple[Path, ...] = ()
    train: dict[Kind, Fit]
    calibrate: Targets = Targets()
    evaluate: Rows = Rows()
    seed: int = 0
    processes: int = Field(default=1, ge=1, le=64)

    def rollouts(self, part: Part) -> Path:
        """Folder of the rollouts of one part."""
        return self.out / "rollouts" / part

    def selector(self, kind: Kind) -> Path:
        """Folder of one selector."""
        return self.out / kind

    def collecting(self, part: Part) -> CollectConfig:
        """The collection of one part.

        Raises:
            ConfigError: the file has no such task.
        """
        task: TaskConfig | None = getattr(self.tasks, part)
        if task is None:
            raise ConfigError(f"the config has no [tasks.{part}].")
        rollouts = self.collect.model_copy(update={"selector": self.first().out}) if part == "again" else self.collect
        return CollectConfig(models=self.models, task=task, out=self.rollouts(part), rollouts=rollouts)

    def first(self) -> TrainConfig:
        """The selector that is in charge of the on-policy round: the first kind, from the training rollouts alone."""
        kind = next(iter(self.train))
        rollouts, out = (self.rollouts("train"),), self.out / "first" / kind
        return TrainConfig(models=self.models, kind=kind, rollouts=rollouts, out=out, fit=self.train[kind])

    def training(self, kind: Kind) -> TrainConfig:
        """The training of one kind.

        Raises:
            ConfigError: the file has no ``[train.<kind>]``.
        """
        if kind not in self.train:
            raise ConfigError(f"the config has no [train.{kind}]; it has {', '.join(self.train)}.")
        parts: tuple[Part, ...] = ("train",) if self.tasks.again is None else ("train", "again")
        rollouts = tuple(map(self.rollouts, parts))
        return TrainConfig(
            models=self.models,
            kind=kind,
            rollouts=rollouts,
            paid=self.paid,
            out=self.selector(kind),
            fit=self.train[kind],
        )

    def calibrating(self, kind: Kind) -> CalibrateConfig:
        """The calibration of one kind."""
        seed = getattr(self.tasks.heldout, "first", 0)
        rollouts = self.rollouts("heldout")
        return CalibrateConfig(
            models=self.models, selector=self.selector(kind), rollouts=rollouts, targets=self.calibrate, seed=seed
        )

    def evaluating(self) -> EvaluateConfig:
        """The table."""
        return EvaluateConfig(
            models=self.models,
            task=self.tasks.test,
            selectors={kind: self.selector(kind) for kind in self.train},
            out=self.out / "evaluation",
            rows=self.evaluate,
            seed=self.seed,
        )

    def probing(self) -> ProbeConfig:
        """Local sufficiency on the held-out rollouts."""
        kind = next(iter(self.train), None)
        return ProbeConfig(
            models=self.models,
            rollouts=self.rollouts("heldout"),
            selector=self.selector(kind) if kind else None,
            out=self.out / "sufficiency",
        )


def read_config(path: Path) -> Pipeline:
    """The pipeline's settings from a TOML file.

    Raises:
        ConfigError: no such file, not TOML, or settings that can not work; the message names each field.
    """
    try:
        found: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} can not be read: {error.strerror}.", hint="Give a TOML file.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}.") from error
    return checked(Pipeline, found, str(path))


def checked(model: type[Model], values: dict[str, Any], where: str) -> Model:
    """Values as a model, or a ConfigError that names each wrong field."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{where}: {wrong}.") from error
