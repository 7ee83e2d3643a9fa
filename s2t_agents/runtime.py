"""From settings to a running engine: weights are loaded at the first call and shared by all who name the same ones."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch

from .engine.steps import Engine
from .errors import ConfigError
from .escalation import DEFAULT_MARGIN, Escalation
from .messages import PromptEncoder
from .models.language_model import LanguageModel
from .selectors import Selector, load_selector
from .selectors.config import SelectorConfig
from .triggers import Trigger, entropy

_lock = threading.Lock()
_loaded: WeakValueDictionary[str, LanguageModel] = WeakValueDictionary()


@dataclass(frozen=True)
class Runtime:
    """What one ``ChatS2T`` runs on.

    Attributes:
        engine: the generator of steps.
        encoder: messages to token ids.
        selector_config: of a selector that was loaded from a directory.
    """

    engine: Engine
    encoder: PromptEncoder
    selector_config: SelectorConfig | None


def shared_model(
    model: str | LanguageModel, *, device: str | None, dtype: torch.dtype | str | None, options: Mapping[str, Any]
) -> LanguageModel:
    """The model, loaded once per (path, device, dtype, options) in this process while anybody holds it.

    Raises:
        ConfigError: no such dtype.
        ModelNotFound, UnsafeWeights: see ``models.loading``.
    """
    if isinstance(model, LanguageModel):
        return model
    key = repr((model, device, dtype, sorted(options.items())))
    with _lock:
        found = _loaded.get(key)
        if found is None:
            found = LanguageModel.load(model, device=device, dtype=torch_dtype(dtype), **options)
            _loaded[key] = found
        return found


def torch_dtype(name: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype from its name, such as "bfloat16"."""
    if name is None or isinstance(name, torch.dtype):
        return name
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype is {name!r}; it must name a floating torch dtype.", hint="Say bfloat16 or float32.")
    return found


def build(
    slm: LanguageModel,
    *,
    k: int | None,
    trigger: Trigger | None,
    selector: str | Path | Selector | None,
    escalation: Escalation | None,
    template_args: Mapping[str, Any],
) -> Runtime:
    """Put an engine together: the selector's calibration fills in what was left open.

    Raises:
        ConfigError, AdapterMismatch, TokenizerMismatch, ModelNotFound, UnsafeWeights: before anything is generated.
    """
    config: SelectorConfig | None = None
    if isinstance(selector, (str, Path)):
        selector, config = load_selector(selector, slm)
    if escalation is not None:
        escalation.llm.check(slm)
    calibration = config.calibration if config else None
    engine = Engine(
        slm,
        k=k or (config.k if config else 8),
        trigger=trigger or (entropy(above=calibration.trigger_entropy) if calibration else None),
        selector=selector,
        escalation=escalation,
        threshold=calibration.escalation_margin if calibration else DEFAULT_MARGIN,
    )
    return Runtime(engine, PromptEncoder(slm.tokenizer, template_args=template_args), config)
