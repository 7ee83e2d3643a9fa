"""From settings to an engine, and from messages to the input of a generation. Weights are loaded at the first call."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from langchain_core.messages import BaseMessage

from ..backends.loading import fitted_tokenizer
from ..bundled import selector_path
from ..engine.engine import Engine
from ..errors import ConfigError, ContextOverflow
from ..escalation import DEFAULT_MARGIN
from ..formats.reasoning import ReasoningParser
from ..grammar.grammar import CompiledGrammar, Grammar
from ..grammar.thinking import ThinkingVocabulary, ThinkThenAnswer, cached_thinking_vocabulary
from ..grammar.vocabulary import Vocabulary, cached_vocabulary
from ..identity import identity
from ..redaction import without_secrets
from ..scheduling.language_model import LanguageModel
from ..selectors import calibrated_trigger, load_selector
from ..selectors.config import SelectorConfig
from ..selectors.drift import DriftWatch
from ..selectors.served import SERVER, Served, ServedSelector
from .engine_settings import EngineSettings, escalation_of
from .generation import GenerationRequest
from .loaded_models import shared_model
from .local_work import LocalWork
from .messages import PromptEncoder
from .recent import Recent
from .response_options import ResponseOptions

_log = logging.getLogger(__name__)

MAX_GRAMMARS = 64
"""Compiled grammars cached per engine, the last used: an agent sends the same tools every turn."""

MAX_ENGINES = 4
"""Engines cached per chat model and its copies, for their own settings and a few that calls override."""


class Runtime:
    """The engine and prompt encoder of one ``ChatS2T``, with caches of compiled grammars and encoders.

    Args:
        engine: generates steps.
        encoder: messages to token ids.
    """

    def __init__(self, engine: Engine, encoder: PromptEncoder) -> None:
        self.engine, self.encoder = engine, encoder
        self._grammars = Recent[str, CompiledGrammar](MAX_GRAMMARS)
        self._encoders = Recent[str, PromptEncoder](MAX_ENGINES)

    def prepare(
        self,
        options: ResponseOptions,
        messages: Sequence[BaseMessage],
        max_tokens: int,
        work: LocalWork,
        *,
        stop: Sequence[str] = (),
        max_thinking_tokens: int | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> GenerationRequest:
        """Encode the prompt and start the grammar of one call; the model does not run yet.

        Args:
            options: tools, tool choice and response format.
            messages: the conversation.
            max_tokens: limit of reasoning and answer together.
            work: reserves the tokens that the answer may have; to be released where nothing comes of it.
            stop: stop strings.
            max_thinking_tokens: limit of the reasoning, without its tags.
            template_args: template variables of this call; they override the model's.

        Raises:
            InputError: messages that cannot be rendered.
            ContextOverflow: the prompt leaves no room for the shortest legal answer.
            BadSchema: a schema that no grammar can express.
            ConfigError: a tool choice that names no tool, or ``max_tokens`` below the shortest legal answer.
            BudgetExceeded: the budget has no answer left, or fewer tokens than the shortest legal one has.
            StoreUnavailable: it cannot be asked.
        """
        window = self.engine.slm.context_window
        tokenizer = self.engine.slm.tokenizer
        encoder = self._encoder(template_args or {})
        prompt = encoder.encode(options.prompt(messages), options.tools, limit=window - 1)
        room = min(max_tokens, window - len(prompt))
        compiled = self._grammar(options)
        thinking = self._thinking
        phase = thinking.format.phase_after(tokenizer, prompt) if thinking is not None else "answer"
        tokens_to_close = (
            thinking.tokens_to_close
            if thinking is not None and phase == "thought" and options.requires_structure
            else 0
        )
        if room < max_tokens and not compiled.fits(room - tokens_to_close):
            raise ContextOverflow(
                f"the prompt has {len(prompt)} tokens and leaves {room} of the context window; the shortest legal "
                f"answer has {compiled.shortest_tokens + tokens_to_close}.",
                hint="Shorten the conversation or the tools.",
            )
        parser, schemas = options.parser(tokenizer), options.schemas
        reader = ReasoningParser(thinking.format, phase) if thinking is not None else None
        room = work.reserve(room)
        grammar: Grammar
        try:
            if thinking is None or phase == "answer":
                grammar = compiled.start(room)
            else:
                limit, structured = max_thinking_tokens, options.requires_structure
                grammar = ThinkThenAnswer(thinking, compiled, phase=phase, room=room, limit=limit, forced=structured)
        except ConfigError:
            if work.too_short is not None:  # the budget's room, not what was asked for
                raise work.too_short from None
            raise
        eos_ids = self.engine.slm.eos_ids
        return GenerationRequest(prompt, grammar, room, parser, eos_ids, schemas, reader, stop)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        slm = self.engine.slm
        return cached_vocabulary(slm.tokenizer, slm.vocab_size, sorted(slm.eos_ids))

    @cached_property
    def _thinking(self) -> ThinkingVocabulary | None:
        format = self.encoder.reasoning
        return (
            cached_thinking_vocabulary(self._vocabulary, self.engine.slm.tokenizer, format)
            if format is not None
            else None
        )

    def _encoder(self, template_args: Mapping[str, Any]) -> PromptEncoder:
        """The encoder with additional template variables; the last few are cached."""
        if not template_args:
            return self.encoder
        key = repr(identity(sorted(template_args.items())))
        return self._encoders.get(key, lambda: self.encoder.with_template_args(template_args))

    def _grammar(self, options: ResponseOptions) -> CompiledGrammar:
        return self._grammars.get(options.cache_key, lambda: options.compile(self._vocabulary))


class RuntimeCache:
    """Engines by settings, for one chat model, its copies and per-call overrides. Deep copies are the same object.

    Since a copy of the chat model shares it, ``configurable_fields`` and ``model_copy`` load nothing again. It pickles
    as an empty cache.
    """

    def __init__(self) -> None:
        self._own: EngineSettings | None = None
        self._own_runtime = Recent[EngineSettings, Runtime](1)
        self._others = Recent[EngineSettings, Runtime](MAX_ENGINES - 1)
        self._encoders = Recent[EngineSettings, PromptEncoder](MAX_ENGINES)

    def __len__(self) -> int:
        """Number of engines in the cache."""
        return len(self._own_runtime) + len(self._others)

    def keep(self, settings: EngineSettings) -> None:
        """Never give up the engine of these settings: those of the chat model that the cache was made for."""
        self._own = self._own or settings

    def get(self, settings: EngineSettings) -> Runtime:
        """The runtime for these settings; built, with its weights loaded, on first use.

        Raises:
            ConfigError, AdapterMismatch, TokenizerMismatch, ModelNotFound, UnsafeWeights: as ``build``.
        """
        runtimes = self._own_runtime if settings == self._own else self._others
        return runtimes.get(settings, lambda: build(settings))

    def encoder(self, settings: EngineSettings) -> PromptEncoder:
        """The prompt encoder alone, for counting tokens; reads no weights."""
        wanted = EngineSettings(
            settings.model,
            model_kwargs=settings.model_kwargs,
            template_args=settings.template_args,
            chat_template=settings.chat_template,
        )
        return self._encoders.get(
            wanted, lambda: encoder_of(settings, _tokenizer_of(settings.model, settings.model_kwargs))
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> RuntimeCache:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return RuntimeCache, ()


def encoder_of(settings: EngineSettings, tokenizer: Any) -> PromptEncoder:
    """A prompt encoder with the settings' chat template and template variables."""
    return PromptEncoder(tokenizer, template_args=settings.template_args, chat_template=settings.chat_template)


def _tokenizer_of(model: str | LanguageModel, options: Mapping[str, Any]) -> Any:
    """The tokenizer as ``LanguageModel`` will have it, without reading the weights."""
    if isinstance(model, LanguageModel):
        return model.tokenizer
    return fitted_tokenizer(model, **options)


def _served(slm: LanguageModel) -> ServedSelector:
    if not slm.capabilities.concurrent_forwards:
        raise ConfigError(
            f"{slm.name!r} runs here, so no server selects for it.", hint="Give the selector's directory instead."
        )
    return ServedSelector()


def build(settings: EngineSettings) -> Runtime:
    """Load the models and build the engine; the selector's calibration gives default k, trigger and margin.

    Raises:
        ConfigError, AdapterMismatch, TokenizerMismatch, ModelNotFound, UnsafeWeights: naming the setting or file.
    """
    slm = shared_model(
        settings.model, device=settings.device, dtype=settings.dtype, options=dict(settings.model_kwargs)
    )
    config: SelectorConfig | None = None
    selector, trigger = settings.selector, settings.trigger
    if selector == SERVER:
        selector, trigger = _served(slm), Served() if trigger is None else trigger
    elif isinstance(selector, (str, Path)):
        selector, config = load_selector(selector, slm)
    escalation = escalation_of(settings.escalation)
    if escalation is not None:
        escalation.llm.check(slm)
    calibration = config.calibration if config else None
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
        shadow=settings.shadow,
    )
    encoder = encoder_of(settings, slm.tokenizer)
    if encoder.passes_over_tool_template:
        _warn_of_tool_template(without_secrets(slm.name))
    return Runtime(engine, encoder)


@lru_cache(maxsize=256)  # once a model
def _warn_of_tool_template(name: str) -> None:
    _log.warning(
        "%s: its chat template 'tool_use' is not used, since it does not write tools, calls and results in the form of "
        "Hermes: they stand as text in the default template. Another one may be given as chat_template=...",
        name,
    )
