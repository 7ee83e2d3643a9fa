"""``selector.json``: a selector's base model, settings and calibrated thresholds."""

from __future__ import annotations

import re
from operator import eq
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..atomic_write import write_whole
from ..backends.fingerprint import same_weights
from ..errors import AdapterMismatch, ConfigError, ModelNotFound
from ..scheduling.language_model import LanguageModel

CONFIG_FILE = "selector.json"

_URL = re.compile(r"[A-Za-z][\w+.-]+:/")
"""How a path begins that was a URL."""


class BaseIdentity(BaseModel):
    """The model that a selector was trained or calibrated on. The last three are None where an older version wrote it.

    Attributes:
        backend: the library that computed it: ``torch`` or ``llama.cpp``.
        quantization: types of its weights; ``none`` of plain ones.
        checkpoint_fingerprint: the same for all quantizations of one checkpoint; None where nothing tells.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    model_type: str
    hidden_size: int = Field(gt=0)
    tokenizer_fingerprint: str
    weights_fingerprint: str
    backend: str | None = None
    quantization: str | None = None
    checkpoint_fingerprint: str | None = None

    @classmethod
    def of(cls, model: LanguageModel) -> BaseIdentity:
        """The identity of a loaded model."""
        return cls(
            name=model.name,
            model_type=model.architecture,
            hidden_size=model.hidden_size,
            tokenizer_fingerprint=model.tokenizer_fingerprint,
            weights_fingerprint=model.weights_fingerprint,
            backend=model.library,
            quantization=model.quantization,
            checkpoint_fingerprint=model.checkpoint_fingerprint,
        )

    @property
    def form(self) -> tuple[str | None, str | None]:
        """Backend and quantization."""
        return self.backend, self.quantization

    def is_another_form_of(self, other: BaseIdentity) -> bool:
        """Whether it is the same checkpoint on another backend, or in another quantization."""
        same = all(
            getattr(self, what) is not None and getattr(self, what) == getattr(other, what)
            for what in ("checkpoint_fingerprint", "tokenizer_fingerprint", "hidden_size")
        )
        return same and None not in (self.backend, other.backend) and self.form != other.form


class Calibration(BaseModel):
    """Thresholds calibrated on held-out rollouts, and the rates measured there.

    Attributes:
        trigger_entropy: threshold of the entropy trigger in nats, used if there is no probe.
        trigger_rate: share of steps that are triggered (by the probe if there is one), with its 95% interval.
        escalation_margin: the selector's margin below which an LLM is asked.
        escalation_rate: share of *triggered* steps below it, with its 95% interval.
        agreement: share of triggered steps where the selector's pick is the LLM's, with its 95% interval.
        agreement_greedy: the same for the SLM's top token.
        false_alarms: share of answers that the selector changes among those that the LLM would not change, with its
            95% interval; None without such answers.
        problems: number of held-out problems.
        seed: of those problems.
        trigger_recall: share of the steps where the LLM disagrees that the entropy trigger finds.
        probe_above: threshold of the learned probe, a probability, at the same trigger rate; None if the probe finds
            no more disagreements than the entropy.
        probe_recall: share of the steps where the LLM disagrees that the probe finds.
        entropy_at: (trigger rate, nats): the entropy threshold of other trigger rates.
        reliability: (mean confidence, agreement with the LLM, triggered steps) in bins of the selector's confidence.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    trigger_entropy: float = Field(ge=0)
    trigger_rate: float = Field(ge=0, le=1)
    trigger_rate_ci95: tuple[float, float]
    escalation_margin: float = Field(ge=0, le=1)
    escalation_rate: float = Field(ge=0, le=1)
    escalation_rate_ci95: tuple[float, float]
    agreement: float = Field(ge=0, le=1)
    agreement_ci95: tuple[float, float]
    agreement_greedy: float = Field(ge=0, le=1)
    false_alarms: float | None = Field(default=None, ge=0, le=1)
    false_alarms_ci95: tuple[float, float] | None = None
    problems: int = Field(gt=0)
    seed: int
    trigger_recall: float | None = Field(default=None, ge=0, le=1)
    probe_above: float | None = Field(default=None, ge=0, le=1)
    probe_recall: float | None = Field(default=None, ge=0, le=1)
    entropy_at: tuple[tuple[float, float], ...] = ()
    reliability: tuple[tuple[float, float, int], ...] = ()

    def entropy_for(self, rate: float) -> float:
        """The entropy threshold of a trigger rate, interpolated in ``entropy_at``.

        Raises:
            ConfigError: there is no such table, or the rate is outside of it.
        """
        if not self.entropy_at:
            raise ConfigError("this calibration has no thresholds by rate.", hint="Run `s2t calibrate` again.")
        low, high = min(self.entropy_at)[0], max(self.entropy_at)[0]
        if not low <= rate <= high:
            raise ConfigError(
                f"no threshold is known for a trigger rate of {rate:g}; calibration knows {low:g} to {high:g}.",
                hint="Use a trigger rate between them.",
            )
        below = max(row for row in self.entropy_at if row[0] <= rate)
        above = min(row for row in self.entropy_at if row[0] >= rate)
        share = (rate - below[0]) / (above[0] - below[0]) if above[0] > below[0] else 0.0
        return below[1] + share * (above[1] - below[1])


class SelectorConfig(BaseModel):
    """The ``selector.json`` of a selector directory; ``temperature`` and ``caution`` as in ``LearnedSelector``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    format: Literal[1] = 1
    kind: Literal["head", "activated", "adapted", "published"]
    base: BaseIdentity
    k: int = Field(ge=1, le=64)
    temperature: float = Field(gt=0, default=1.0)
    caution: float = Field(ge=0, default=0.0)
    calibration: Calibration | None = None
    training: dict[str, Any] = {}

    def save(self, path: Path) -> None:
        """Write ``selector.json`` into a directory."""
        write_whole(path / CONFIG_FILE, (self.model_dump_json(indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> SelectorConfig:
        """Read and validate a directory's ``selector.json``.

        Raises:
            ModelNotFound: no such file.
            ConfigError: the file is not a valid selector config; the message names each field.
        """
        file = path / CONFIG_FILE
        if not file.is_file():
            where = "a URL" if _URL.match(str(path)) else repr(str(path))  # any part of a URL may be a secret
            raise ModelNotFound(
                f"no selector at {where}: {CONFIG_FILE} is missing.", hint="Train one with `s2t train`."
            )
        try:
            return cls.model_validate_json(file.read_bytes())
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
            raise ConfigError(f"{file} is not a selector config: {wrong}.") from error

    def check_base(self, model: LanguageModel) -> None:
        """Refuse a base model or tokenizer that the selector was not trained for.

        Another backend or quantization of the same checkpoint is taken; ``reference`` measures how much it differs.

        Raises:
            AdapterMismatch: naming what differs.
        """
        actual = BaseIdentity.of(model)
        wanted = self.base
        if actual.is_another_form_of(wanted):
            return
        alike = {"tokenizer_fingerprint": eq, "model_type": eq, "hidden_size": eq, "weights_fingerprint": same_weights}
        for what, same in alike.items():
            if not same(getattr(wanted, what), getattr(actual, what)):
                raise AdapterMismatch(
                    f"this selector was trained for {wanted.name!r}, not {model.name!r}: "
                    f"{what} is {getattr(actual, what)!r}, it needs {getattr(wanted, what)!r}.",
                    hint="Load the base it was trained for, or train a selector for this one (s2t train).",
                )
