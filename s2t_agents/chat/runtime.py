"""From settings to a running engine: weights are loaded at the first call and shared by all who name the same ones."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from langchain_core.language_models import ModelProfile
from langchain_core.messages import BaseMessage

from ..backends.torch.language_model import LanguageModel
from ..backends.torch.loading import load_tokenizer
from ..bundled import selector_path
from ..engine.engine import MAX_K, Engine
from ..errors import ConfigError, ContextOverflow
from ..escalation import DEFAULT_MARGIN, Escalation
from ..fork_safety import LOADING, hold_while_forking
from ..formats.reasoning import ThoughtReader
from ..formats.tool_calls import PlainText, ToolCallParser
from ..grammar.grammar import CompiledGrammar, Grammar, Vocabulary, vocabulary
from ..grammar.thinking import ThinkingVocabulary, ThinkThenAnswer, thinking_vocabulary
from ..hub import Origin
from ..llms import LLMSelector, LocalLLM
from ..redaction import without_secrets
from ..scheduling.admission import Concurrency
from ..selectors import Selector, calibrated_trigger, load_selector
from ..selectors.config import SelectorConfig
from ..selectors.drift import DriftWatch
from ..tokenization.vocabulary import fitted
from ..triggers import Trigger
from .messages import PromptEncoder
from .request import Checks, Request

GRAMMARS_KEPT = 64
"""Compiled grammars per engine: an agent sends the same tools every turn."""

ENGINES_KEPT = 4
"""Engines per chat model and its copies: their own settings, and a few that calls or copies override."""

_lock = threading.RLock()
_loaded: WeakValueDictionary[str, LanguageModel] = WeakValueDictionary()
hold_while_forking(sys.modules[__name__], "_lock", LOADING)


@dataclass(frozen=True)
class Settings:
    """Everything that an engine is made of; equal settings share one.

    Attributes are those of ``ChatS2T`` with the same names.
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

    def check(self) -> None:
        """Find what cannot work, before any file is read.

        Raises:
            ConfigError: naming the setting.
        """
        if self.k is not None and not 1 <= self.k <= MAX_K:
            raise ConfigError(f"k is {self.k}; between 1 and {MAX_K} candidates can be scored at a step.")
        if self.trigger is not None and not isinstance(self.trigger, Trigger):
            raise ConfigError(f"trigger is a {type(self.trigger).__name__}.", hint="Take one of s2t_agents.triggers.")
        chosen = self.selector
        if chosen is not None and not isinstance(chosen, (str, Path)) and not hasattr(chosen, "scores"):
            raise ConfigError(f"selector is a {type(chosen).__name__}.", hint="Give a directory or a Selector.")
        torch_dtype(self.dtype)
        Origin.of(str(self.described()["model"]), self.model_kwargs)
        if self.device is not None:
            _check_device(self.device)

    def described(self) -> dict[str, Any]:
        """All that changes an answer, as plain data; the device and the concurrency do not."""
        return {
            "model": without_secrets(self.model if isinstance(self.model, str) else self.model.name),
            "selector": str(self.selector),
            "escalation": repr(escalation_of(self.escalation)),
            "k": self.k,
            "trigger": repr(self.trigger),
            "dtype": str(self.dtype),
            "model_kwargs": without_secrets(self.model_kwargs),
            "template_args": without_secrets(self.template_args),
            "chat_template": self.chat_template,
        }


@dataclass(frozen=True)
class Task:
    """What one answer is made from.

    Attributes:
        prompt: token ids.
        grammar: what is legal.
        room: tokens that it may have.
        parser: reads it.
        checks: what it is held to when it is finished.
        thoughts: tells the thought from the answer; None where the model knows no thoughts.
    """

    prompt: list[int]
    grammar: Grammar
    room: int
    parser: ToolCallParser | PlainText
    checks: Checks
    thoughts: ThoughtReader | None = None


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
    _encoders: dict[str, PromptEncoder] = field(default_factory=dict)

    def task(
        self,
        request: Request,
        messages: Sequence[BaseMessage],
        max_tokens: int,
        *,
        max_thinking_tokens: int | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> Task:
        """Everything the engine needs for one answer; nothing has run yet.

        Args:
            request: what may be answered with.
            messages: the conversation.
            max_tokens: of the thought and the answer together.
            max_thinking_tokens: of the thought, its tags not counted.
            template_args: this call's own, beside and before the model's.

        Raises:
            InputError: messages that cannot be rendered.
            ContextOverflow: they leave no room for the shortest legal answer.
            BadSchema: a schema that no grammar can express.
            ConfigError: a tool choice that fits no tool, or ``max_tokens`` that hold no legal answer.
        """
        window = self.engine.slm.context_window
        tokenizer = self.engine.slm.tokenizer
        encoder = self._encoder(template_args or {})
        prompt = encoder.encode(request.prompt(messages), request.tools, limit=window - 1)
        room = min(max_tokens, window - len(prompt))
        compiled = self._grammar(request)
        thinking = self._thinking
        place = thinking.format.place(tokenizer, prompt) if thinking is not None else "answer"
        closing = thinking.tokens_to_close if thinking is not None and place == "thought" and request.formal else 0
        if room < max_tokens and not compiled.fits(room - closing):
            raise ContextOverflow(
                f"the prompt has {len(prompt)} tokens and leaves {room} of the context window; the shortest legal "
                f"answer has {compiled.fewest_tokens + closing}.",
                hint="Shorten the conversation or the tools.",
            )
        parser, checks = request.parser(tokenizer), request.checks
        if thinking is None:
            return Task(prompt, compiled.start(room), room, parser, checks)
        reader = ThoughtReader(thinking.format, place)
        if place == "answer":
            return Task(prompt, compiled.start(room), room, parser, checks, reader)
        limit, formal = max_thinking_tokens, request.formal
        grammar = ThinkThenAnswer(thinking, compiled, place=place, room=room, limit=limit, forced=formal)
        return Task(prompt, grammar, room, parser, checks, reader)

    @cached_property
    def _words(self) -> Vocabulary:
        slm = self.engine.slm
        return vocabulary(slm.tokenizer, slm.vocab_size, sorted(slm.eos_ids))

    @cached_property
    def _thinking(self) -> ThinkingVocabulary | None:
        format = self.encoder.reasoning
        return thinking_vocabulary(self._words, self.engine.slm.tokenizer, format) if format is not None else None

    def _encoder(self, template_args: Mapping[str, Any]) -> PromptEncoder:
        """The encoder with more variables for the template; a few are kept."""
        if not template_args:
            return self.encoder
        key = repr(sorted(template_args.items()))
        if key not in self._encoders:
            while len(self._encoders) >= ENGINES_KEPT:
                self._encoders.pop(next(iter(self._encoders)), None)
            self._encoders[key] = self.encoder.with_template_args(template_args)
        return self._encoders[key]

    def _grammar(self, request: Request) -> CompiledGrammar:
        key = request.key
        if key not in self._compiled:
            compiled = request.compile(self._words)
            while len(self._compiled) >= GRAMMARS_KEPT:
                self._compiled.pop(next(iter(self._compiled)), None)
            self._compiled[key] = compiled
        return self._compiled[key]


class Runtimes:
    """The engines of one chat model, of its copies and of what calls override. Copies and pickles as empty settings.

    A copy of the chat model holds the same object, so ``configurable_fields`` and ``model_copy`` load nothing anew.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # the same thread may fork while it loads
        hold_while_forking(self, "_lock", LOADING)
        self._kept: list[tuple[Settings, Runtime]] = []
        self._encoders: list[tuple[Settings, PromptEncoder]] = []

    def get(self, settings: Settings) -> Runtime:
        """The engine for these settings; made, and its weights loaded, on first use.

        Raises:
            ConfigError, AdapterMismatch, TokenizerMismatch, ModelNotFound, UnsafeWeights: before anything is generated.
        """
        with self._lock:
            for known, runtime in self._kept:
                if known == settings:
                    return runtime
            runtime = build(settings)
            self._kept = [*self._kept[1 - ENGINES_KEPT :], (settings, runtime)]
            return runtime

    def encoder(self, settings: Settings) -> PromptEncoder:
        """The encoder alone, for counting: it reads no weights."""
        wanted = Settings(
            settings.model,
            model_kwargs=settings.model_kwargs,
            template_args=settings.template_args,
            chat_template=settings.chat_template,
        )
        with self._lock:
            for known, encoder in self._encoders:
                if known == wanted:
                    return encoder
            encoder = encoder_of(settings, _tokenizer_of(settings.model, settings.model_kwargs))
            self._encoders = [*self._encoders[1 - ENGINES_KEPT :], (wanted, encoder)]
            return encoder

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtimes:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Runtimes, ()


def encoder_of(settings: Settings, tokenizer: Any) -> PromptEncoder:
    """The encoder that these settings ask for."""
    return PromptEncoder(tokenizer, template_args=settings.template_args, chat_template=settings.chat_template)


def _tokenizer_of(model: str | LanguageModel, options: Mapping[str, Any]) -> Any:
    """The tokenizer as the model's weights will have it, without reading these."""
    if isinstance(model, LanguageModel):
        return model.tokenizer
    options = dict(options)
    tokenizer = options.pop("tokenizer", None) or load_tokenizer(model, **options)
    rows = _text_config(model, options).get("vocab_size")
    return fitted(tokenizer, rows, model) if isinstance(rows, int) else tokenizer


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
    mine = {name: id(value) if name == "tokenizer" else value for name, value in options.items()}
    key = repr((model, device, dtype, sorted(mine.items())))
    with _lock:
        found = _loaded.get(key)
        if found is None:
            found = LanguageModel.load(model, device=device, dtype=torch_dtype(dtype), **options)
            _loaded[key] = found
        return found


def model_of(given: Any) -> str | LanguageModel:
    """A ``model`` setting as a directory or hub id, or a loaded model.

    Raises:
        ConfigError: something else.
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
        raise ConfigError(f"dtype is {name!r}; it must name a floating torch dtype.", hint="Say bfloat16 or float32.")
    return found


def _check_device(name: str) -> None:
    try:
        torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device is {name!r}.", hint='Say "cpu", "cuda" or "cuda:1".') from None


def escalation_of(given: Any) -> Escalation | None:
    """An ``escalation`` setting as an ``Escalation``: a path or an LLM alone takes the calibrated margin.

    Raises:
        ConfigError: something else.
    """
    if given is None or isinstance(given, Escalation):
        return given
    if isinstance(given, (str, Path)):
        return Escalation(LocalLLM(str(given)))
    if hasattr(given, "open") and hasattr(given, "check"):
        llm: LLMSelector = given
        return Escalation(llm)
    raise ConfigError(f"escalation is a {type(given).__name__}.", hint="Give an LLM (LocalLLM, ...) or Escalation.")


def profile_of(model: str | LanguageModel, max_tokens: int, options: Mapping[str, Any]) -> ModelProfile:
    """What LangChain may ask of a model; its window is left out where no config lies on this disk. Reads no weights."""
    profile = ModelProfile(
        name=model if isinstance(model, str) else model.name,
        max_output_tokens=max_tokens,
        text_inputs=True,
        image_inputs=False,
        audio_inputs=False,
        pdf_inputs=False,
        text_outputs=True,
        tool_calling=True,
        tool_choice=True,
        tool_call_streaming=True,
        structured_output=True,
    )
    window = _window_of(model, options)
    return profile if window is None else ModelProfile(**profile, max_input_tokens=window)


def _window_of(model: str | LanguageModel, options: Mapping[str, Any]) -> int | None:
    if isinstance(model, LanguageModel):
        return model.context_window
    try:
        limit = _text_config(model, options).get("max_position_embeddings")
    except ConfigError:  # told when the model is loaded
        return None
    return limit if isinstance(limit, int) else None


def _text_config(model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` of the part that reads text, where it lies on this disk; empty where it does not."""
    read = Origin.of(model, options).config(here=True) or {}
    part = read.get("text_config")
    return {**read, **part} if isinstance(part, dict) else read


def build(settings: Settings) -> Runtime:
    """Put an engine together: the selector's calibration fills in what was left open."""
    slm = shared_model(
        settings.model, device=settings.device, dtype=settings.dtype, options=dict(settings.model_kwargs)
    )
    config: SelectorConfig | None = None
    selector = settings.selector
    if isinstance(selector, (str, Path)):
        selector, config = load_selector(selector, slm)
    escalation = escalation_of(settings.escalation)
    if escalation is not None:
        escalation.llm.check(slm)
    calibration = config.calibration if config else None
    trigger = settings.trigger
    drift: DriftWatch | None = None
    if trigger is None and config and calibration:
        trigger = calibrated_trigger(selector_path(str(settings.selector)), config)
        by_margin = escalation is not None and escalation.margin is None and escalation.pacing is None
        drift = DriftWatch(calibration, escalations=by_margin)
    engine = Engine(
        slm,
        k=settings.k or (config.k if config else 8),
        trigger=trigger,
        selector=selector,
        escalation=escalation,
        threshold=calibration.escalation_margin if calibration else DEFAULT_MARGIN,
        concurrency=settings.concurrency,
        drift=drift,
    )
    return Runtime(engine, encoder_of(settings, slm.tokenizer), config)
