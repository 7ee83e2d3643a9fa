"""From settings to a running engine: weights are loaded at the first call and shared by all who name the same ones."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch

from .engine.grammar import CompiledGrammar, json_grammar, tool_grammar, vocabulary
from .engine.steps import Engine
from .errors import ConfigError
from .escalation import DEFAULT_MARGIN, Escalation
from .messages import PromptEncoder
from .models.language_model import LanguageModel
from .selectors import Selector, load_selector
from .selectors.config import SelectorConfig
from .triggers import Trigger, entropy

GRAMMARS_KEPT = 64
"""Compiled grammars per model: an agent sends the same tools every turn."""

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
    _compiled: dict[str, CompiledGrammar] = field(default_factory=dict)

    def grammar(self, call: Mapping[str, Any]) -> CompiledGrammar | None:
        """What the arguments of a call make legal; None where anything is.

        Args:
            call: ``tools`` with ``tool_choice`` and ``parallel_tool_calls``, or an OpenAI ``response_format``.

        Raises:
            BadSchema: a schema that no grammar can express.
            ConfigError: a tool choice that fits no tool, or an unknown response format.
        """
        asked = {
            key: call[key] for key in ("tools", "tool_choice", "parallel_tool_calls", "response_format") if key in call
        }
        if not asked.get("tools") and not asked.get("response_format"):
            return None
        key = json.dumps(asked, sort_keys=True, default=str)
        if key not in self._compiled:
            while len(self._compiled) >= GRAMMARS_KEPT:
                self._compiled.pop(next(iter(self._compiled)))
            self._compiled[key] = self._compile(asked)
        return self._compiled[key]

    def _compile(self, asked: Mapping[str, Any]) -> CompiledGrammar:
        slm = self.engine.slm
        words = vocabulary(slm.tokenizer, slm.vocab_size, sorted(slm.eos_ids))
        if asked.get("response_format"):
            return json_grammar(words, wanted_schema(asked["response_format"]))
        parallel = asked.get("parallel_tool_calls")
        return tool_grammar(
            words, asked["tools"], chosen_tool(asked.get("tool_choice")), parallel=parallel is None or bool(parallel)
        )


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


def chosen_tool(choice: Any) -> str:
    """A tool choice in any of OpenAI's spellings as "auto", "any", "none" or a tool's name."""
    if isinstance(choice, Mapping):
        return str(choice.get("function", choice).get("name"))
    spelled = {None: "auto", True: "any", False: "none", "required": "any", "any": "any"}
    return str(spelled.get(choice, choice))


def wanted_schema(response_format: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The JSON schema of an OpenAI ``response_format``; None where any JSON object will do."""
    kind = response_format.get("type")
    if kind == "json_object":
        return None
    if kind == "json_schema":
        schema: Mapping[str, Any] = response_format["json_schema"]["schema"]
        return schema
    raise ConfigError(f"response_format has type {kind!r}.", hint="Use json_schema or json_object.")


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
