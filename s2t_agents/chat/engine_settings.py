"""The settings that an engine is built from, checked without reading any file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..engine.engine import MAX_K
from ..errors import ConfigError
from ..escalation import Escalation
from ..hub import ModelSource
from ..identity import identity
from ..llms.front import llm_of
from ..redaction import url_without_secrets, without_secrets
from ..scheduling.admission import Concurrency
from ..scheduling.language_model import LanguageModel
from ..selectors import Selector
from ..selectors.served import SERVER
from ..tokenization.chat_template import check_template_args
from ..triggers import Trigger


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is built from; equal settings share one engine.

    The attributes are those of ``ChatS2T`` with the same names.
    """

    model: str | LanguageModel
    selector: str | Path | Selector | None = None
    escalation: Any = None
    k: int | None = None
    trigger: Trigger | None = None
    device: str | None = None
    dtype: torch.dtype | str | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    template_args: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    concurrency: Concurrency | None = None
    shadow: bool = False

    def check(self) -> None:
        """Validate the settings without reading any file.

        Raises:
            ConfigError: an invalid setting; the message names it.
        """
        if self.k is not None and not 1 <= self.k <= MAX_K:
            raise ConfigError(f"k is {self.k}; between 1 and {MAX_K} candidates can be scored at a step.")
        if self.trigger is not None and not isinstance(self.trigger, Trigger):
            raise ConfigError(f"trigger is a {type(self.trigger).__name__}.", hint="Use one of s2t_agents.triggers.")
        chosen = self.selector
        if chosen is not None and not isinstance(chosen, (str, Path)) and not hasattr(chosen, "scores"):
            raise ConfigError(f"selector is a {type(chosen).__name__}.", hint="Give a directory or a Selector.")
        if self.shadow and chosen == SERVER:
            raise ConfigError(
                'shadow=True and selector="server": the model\'s server picks the tokens itself.',
                hint="Give the selector's directory, or serve the model without it.",
            )
        check_template_args(self.template_args)
        torch_dtype(self.dtype)
        ModelSource.of(self.model if isinstance(self.model, str) else self.model.name, self.model_kwargs)
        if self.device is not None:
            _check_device(self.device)

    def identifying_params(self) -> dict[str, Any]:
        """The settings that change an answer, as plain data: everything but device and concurrency."""
        escalation = escalation_of(self.escalation)
        return {
            "model": without_secrets(self.model if isinstance(self.model, str) else self.model.name),
            "loaded": None if isinstance(self.model, str) else repr(self.model),
            "selector": identity(url_without_secrets(self.selector)),
            "escalation": escalation and [identity(each) for each in escalation.changing_answers],
            "k": self.k,
            "trigger": identity(self.trigger),
            "dtype": identity(self.dtype),
            "model_kwargs": identity(without_secrets(self.model_kwargs)),
            "template_args": identity(without_secrets(self.template_args)),
            "chat_template": self.chat_template,
            "shadow": self.shadow,
        }


def model_of(given: Any) -> str | LanguageModel:
    """A ``model`` setting as a directory or hub id, or a loaded model.

    Raises:
        ConfigError: another type.
    """
    if isinstance(given, Path):
        return str(given)
    if isinstance(given, (str, LanguageModel)):
        return given
    raise ConfigError(f"model is a {type(given).__name__}.", hint="Give a directory, a hub id or a LanguageModel.")


def torch_dtype(name: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype from its name, such as "bfloat16"."""
    if name is None or isinstance(name, torch.dtype):
        return name
    found = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype is {name!r}; it must name a floating torch dtype.", hint="Use bfloat16 or float32.")
    return found


def _check_device(name: str) -> None:
    try:
        torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device is {name!r}.", hint='Say "cpu", "cuda" or "cuda:1".') from None


def escalation_of(given: Any) -> Escalation | None:
    """An ``escalation`` setting as an ``Escalation``; an LLM by its name, or alone, gets the calibrated margin.

    Raises:
        ConfigError: see ``llms.front.llm_of``.
    """
    return given if given is None or isinstance(given, Escalation) else Escalation(llm_of(given))
