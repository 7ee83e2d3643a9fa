"""What every stage is given, and the one TOML file that holds it all. See ``s2t_agents/demo/selector.toml``."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from ..errors import ConfigError
from .settings import KINDS, Adapter, EvaluationRows, Fit, Kind, Models, Rollouts, ServedPrice, Settings, Targets
from .tasks import BfclTaskConfig, DemoTaskConfig, JsonlTaskConfig, TaskConfig, WordProblemsConfig

__all__ = [
    "KINDS",
    "Adapter",
    "CalibrateConfig",
    "CollectConfig",
    "EvaluateConfig",
    "EvaluationRows",
    "Fit",
    "Kind",
    "Models",
    "Part",
    "Pipeline",
    "ProbeConfig",
    "Rollouts",
    "Targets",
    "Tasks",
    "TrainConfig",
    "checked",
    "read_config",
]

Part = Literal["train", "heldout", "again"]
Model = TypeVar("Model", bound=BaseModel)


class CollectConfig(Settings):
    """One collection: which models, which prompts, where to."""

    models: Models
    task: TaskConfig
    out: Path
    rollouts: Rollouts = Rollouts()


def check_prompt_share(models: Models, kind: Kind, fit: Fit) -> None:
    """Whether this kind can learn from prompts.

    Raises:
        ValueError: it cannot, or the LLM is not on this machine.
    """
    if not fit.prompt_share:
        return
    if kind != "adapted":
        raise ValueError(f"prompt_share is {fit.prompt_share}, but only the adapted kind reads prompts; it must be 0")
    if models.llm_server is not None:
        raise ValueError(
            f"prompt_share is {fit.prompt_share}, which needs the LLM on this machine: {models.llm_server} tells the "
            "likeliest tokens alone; set it to 0, or leave llm_server out"
        )


class TrainConfig(Settings):
    """One selector: its kind, its rollouts, files of paid selections to learn from besides, where to."""

    models: Models
    kind: Kind
    rollouts: tuple[Path, ...]
    paid: tuple[Path, ...] = ()
    out: Path
    fit: Fit = Fit()

    @model_validator(mode="after")
    def _llm_at_hand(self) -> TrainConfig:
        check_prompt_share(self.models, self.kind, self.fit)
        return self


class CalibrateConfig(Settings):
    """A trained selector and held-out rollouts; ``seed`` is written down beside the figures."""

    selector: Path
    rollouts: Path
    targets: Targets = Targets()
    seed: int = 0


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
    selectors: dict[Kind, Path] = Field(default_factory=dict)
    out: Path | None = None
    rows: EvaluationRows = EvaluationRows()
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
        named: more to test on, by the names that ``s2t eval --task`` takes.
    """

    train: TaskConfig
    heldout: TaskConfig
    test: TaskConfig
    again: TaskConfig | None = None
    named: dict[str, TaskConfig] = Field(default_factory=dict)


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
    evaluate: EvaluationRows = EvaluationRows()
    seed: int = 0
    processes: int = Field(default=1, ge=1, le=64)

    @model_validator(mode="after")
    def _llm_at_hand(self) -> Pipeline:
        for kind, fit in self.train.items():
            check_prompt_share(self.models, kind, fit)
        return self

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

    def kinds(self, asked: Sequence[str] | None = None) -> list[Kind]:
        """The kinds that the file trains, in its order, or those of them that were asked for.

        Raises:
            ConfigError: it trains none, or not one of these.
        """
        if not self.train:
            raise ConfigError("the config trains no selector.", hint="Add [train.head], for one.")
        lacking = [kind for kind in asked or () if kind not in self.train]
        if lacking:
            raise ConfigError(f"the config has no [train.{lacking[0]}]; it has {', '.join(self.train)}.")
        return [kind for kind in self.train if not asked or kind in asked]

    def first(self) -> TrainConfig:
        """The selector that is in charge of the on-policy round: the first kind, from the training rollouts alone.

        Raises:
            ConfigError: the file trains none.
        """
        kind = self.kinds()[0]
        rollouts, out = (self.rollouts("train"),), self.out / "first" / kind
        return TrainConfig(models=self.models, kind=kind, rollouts=rollouts, out=out, fit=self.train[kind])

    def training(self, kind: Kind) -> TrainConfig:
        """The training of one kind.

        Raises:
            ConfigError: the file has no ``[train.<kind>]``.
        """
        self.kinds([kind])
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
        return CalibrateConfig(selector=self.selector(kind), rollouts=rollouts, targets=self.calibrate, seed=seed)

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
        ConfigError: no such file, not TOML, or settings that cannot work; the message names each field.
    """
    try:
        found: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.", hint="Give a TOML file.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}.") from error
    return checked(Pipeline, found, str(path))


def checked(model: type[Model], values: dict[str, Any], where: str) -> Model:
    """Values as a model, or a ConfigError that names each wrong field, its value, and for a name that is none the
    nearest one."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        wrong = "; ".join(map(_wrong, error.errors()))
        raise ConfigError(f"{where}: {wrong}.") from error


def _wrong(error: ErrorDetails) -> str:
    place = [str(part) for part in error["loc"] if part != "[key]"]
    said = f"{'.'.join(place) or 'file'}: {error['msg']}"
    if error["type"] == "missing" or isinstance(error["input"], dict | list):
        value = ""
    else:
        value = f", it is {error['input']!r:.60}"
    meant = get_close_matches(place[-1], _names(), n=1) if error["type"] == "extra_forbidden" else []
    return said + (f" (did you mean {meant[0]}?)" if meant else value)


@cache
def _names() -> list[str]:
    """Of all sections and settings."""
    tasks = (DemoTaskConfig, JsonlTaskConfig, BfclTaskConfig, WordProblemsConfig)
    sections = (Pipeline, Tasks, Models, ServedPrice, Rollouts, Fit, Adapter, Targets, EvaluationRows, *tasks)
    return sorted({name for section in sections for name in section.model_fields})
