"""``ChatS2T``: a LangChain chat model that runs here, looks twice where it is unsure, and asks within a budget.

messages + tools -> PromptEncoder -> token ids -> Engine.run() -> Generation -> AIMessage / chunks
                                                                     └-> Account -> response_metadata, Ledger
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun, Callbacks
from langchain_core.language_models import LanguageModelInput, ModelProfile
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.outputs import Generation as CachedGeneration
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.tools import BaseTool
from pydantic import ConfigDict, Field, SecretStr, SkipValidation, ValidationError, field_serializer

from ..backends.torch.language_model import LanguageModel
from ..budget import Budget, DevicePrice
from ..call_scope import AsyncOnBehalf, CallScope, calling, on_behalf
from ..engine.engine import Engine
from ..errors import ConfigError
from ..escalation import Escalation
from ..formats.reasoning import thinking_limit
from ..hub import elsewhere
from ..ledger import Ledger
from ..llms import LLMSelector
from ..redaction import without_secrets
from ..scheduling.admission import Concurrency, Place
from ..selectors import Selector
from ..tokenization.chat_template import chat_template_of
from ..triggers import Trigger
from ..types import Sampling, Step
from . import answers
from .accounting import Account
from .async_bridge import in_threads
from .attribution import current_caller, listened
from .call_arguments import (
    TakesConfig,
    budget_of,
    cache_scope_of,
    check_call,
    foreign,
    refusal,
    template_args_of,
    unfinished_of,
    without_nones,
)
from .generation import Generation
from .request import Request, openai_tools
from .runtime import Runtimes, Settings, escalation_of, model_of, profile_of
from .structured_output import Method, structured
from .token_count import tokens_of_messages
from .unfinished_answers import NOTHING, conversation_key

_DICTS = ("model_kwargs", "template_args", "metadata")
"""Settings that hold anything, secrets too: those never leave the process."""


class ChatS2T(TakesConfig):
    """A small local model, corrected at the few tokens where it is unsure.

    With neither ``selector`` nor ``escalation`` it is simply a local chat model for any Hugging Face checkpoint.

    >>> llm = ChatS2T(selector="s2t-demo", escalation=LocalLLM("s2t-demo-llm"), budget=Budget(escalations=3))
    >>> llm.invoke("Ann has 37 shells and finds 48 more. How many are there now?").response_metadata["s2t"]

    Args:
        model: directory or hub id of the SLM; "s2t-demo" is bundled. A loaded ``LanguageModel`` works too.
        selector: directory of a trained selector, "s2t-demo" for the bundled one, or any ``Selector``.
        escalation: the LLM to ask where even that is unsure, or an ``Escalation`` with a margin of its own.
        budget: what escalations may spend; a call's ``s2t_budget`` takes its place.
        ledger: takes one record per generation.
        k: candidates per critical step, 1 to 64; None takes the selector's own, or 8.
        trigger: which steps are critical; None takes the selector's calibrated one.
        temperature: 0 is greedy.
        top_p: nucleus mass, used when temperature is above 0.
        max_tokens: limit of one answer, its thought included, in tokens.
        max_thinking_tokens: limit of the thought before an answer, in tokens: it is closed there, and the answer
            follows. 0 closes it at once; None sets none beside ``max_tokens``. A call's own takes its place.
        stop: stop strings.
        seed: of sampling.
        device: "cpu", "cuda:1", ...; None chooses.
        dtype: "bfloat16", ...; None chooses.
        device_price: USD per hour of the SLM's device; None leaves the local cost unknown.
        concurrency: how many generations run at once and who waits behind them.
        cache_scope: KV of earlier turns is shared within one scope only; give tenants their own.
            A call's ``s2t_cache_scope``, or the enclosing node's ``configurable``, takes its place.
        model_kwargs: passed to ``from_pretrained``, such as ``revision`` or ``quantization_config``; ``revision``,
            ``subfolder`` and ``trust_remote_code`` are not meant for another model that a call names.
        chat_template: in place of the tokenizer's: a Jinja template (a text with a brace or a line break in it), or a
            file that holds one, which is read at once.
        template_args: variables of the chat template, such as ``{"enable_thinking": False}``; a call's own go first.
        on_step: called with the trace id and every step, for traces.
        streaming: True generates by streaming under ``invoke`` too, as LangChain's callbacks may want.
        api_key, max_retries, timeout: accepted and unused, so that settings written for a hosted model can stay.
        runtimes: engines made so far; copies of the model share them.

    Raises:
        ConfigError: a setting that cannot work; everything but the files is checked here, files at the first call.
        UnpricedModel: a dollar budget over an LLM without a price.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", protected_namespaces=())

    model: SkipValidation[str | Path | LanguageModel] = "s2t-demo"
    selector: SkipValidation[str | Path | Selector | None] = None
    escalation: SkipValidation[str | Path | LLMSelector | Escalation | None] = None
    budget: Budget | None = Field(default=None, exclude=True)
    ledger: Ledger | None = Field(default=None, exclude=True)
    k: int | None = None
    trigger: SkipValidation[Trigger | None] = None
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 512
    max_thinking_tokens: SkipValidation[int | None] = None
    stop: str | list[str] | None = None
    seed: int | None = None
    device: str | None = None
    dtype: SkipValidation[str | torch.dtype | None] = None
    device_price: DevicePrice | None = None
    concurrency: Concurrency | None = None
    cache_scope: str | None = None
    model_kwargs: dict[str, Any] = Field(default_factory=dict, repr=False)
    template_args: dict[str, Any] = Field(default_factory=dict)
    chat_template: str | Path | None = None
    on_step: Callable[[str, Step], None] | None = Field(default=None, exclude=True)
    streaming: bool | None = None
    api_key: SecretStr | None = Field(default=None, exclude=True, repr=False)
    max_retries: int | None = None
    timeout: float | None = None
    runtimes: Runtimes = Field(default_factory=Runtimes, exclude=True, repr=False)
    callbacks: Callbacks = Field(default=None, exclude=True, repr=False)

    if not TYPE_CHECKING:  # type checkers take the fields for the signature

        def __init__(self, **settings: Any) -> None:
            fields = type(self).model_fields
            try:
                super().__init__(**without_nones(settings, fields))
            except ValidationError as error:
                raise refusal(error, fields) from None
            self.chat_template = chat_template_of(self.chat_template)
            self._check()  # here, not in a validator: pydantic would wrap our errors in its own
            self.callbacks = listened(self.callbacks)

    # ------------------------------------------------------------------ settings

    def _check(self) -> None:
        self._sampling({})
        thinking_limit(self.max_thinking_tokens)
        self._settings({}).check()
        if (escalation := escalation_of(self.escalation)) is not None:
            escalation.check_price(self.budget)

    def _sampling(self, call: Mapping[str, Any], banned_first: Sequence[int] = ()) -> Sampling:
        """Sampling of one call: its own arguments before the model's."""
        return Sampling(
            temperature=_given(call.get("temperature"), self.temperature),
            top_p=_given(call.get("top_p"), self.top_p),
            seed=_given(call.get("seed"), self.seed),
            max_tokens=_given(call.get("max_tokens"), self.max_tokens),
            banned_first=banned_first,
        )

    def _settings(self, call: Mapping[str, Any]) -> Settings:
        """What the engine of one call is made of.

        Another model than this one's (``model=``) runs without the selector, which was trained for this one, and
        without an escalation to itself.
        """
        slm = model_of(self.model)
        model = model_of(_given(call.get("model"), slm))
        own = model == slm
        escalation = escalation_of(self.escalation)
        to_itself = not own and escalation is not None and escalation.llm.name == model
        return Settings(
            model=model,
            selector=self.selector if own else None,
            escalation=None if to_itself else self.escalation,
            k=self.k,
            trigger=self.trigger,
            device=self.device,
            dtype=self.dtype,
            model_kwargs=self.model_kwargs if own else elsewhere(self.model_kwargs),
            template_args=self.template_args,
            chat_template=chat_template_of(self.chat_template) if own else None,
            concurrency=self.concurrency,
        )

    @property
    def engine(self) -> Engine:
        """The engine under this model; reading it loads the weights."""
        return self.runtimes.get(self._settings({})).engine

    def __getstate__(self) -> dict[Any, Any]:
        """Pickles as its settings: engines come back, by name, when needed. Keys, tokens and passwords stay behind.

        Where it is unpickled, a hub's token comes from that machine's environment or login.
        """
        state = super().__getstate__()
        clean = {name: without_secrets(getattr(self, name)) for name in _DICTS}
        return {**state, "__dict__": {**state["__dict__"], "model": self.model_name, "api_key": None, **clean}}

    @field_serializer(*_DICTS)
    def _dumped(self, value: Any) -> Any:
        return without_secrets(value)

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        return [(name, without_secrets(value)) for name, value in super().__repr_args__()]

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> ChatS2T:
        """A model of its own over the same weights, budget and ledger: a copied agent must not double the money."""
        return self.model_copy()

    # ------------------------------------------------------------------ LangChain

    @property
    def _llm_type(self) -> str:
        return "chat-s2t"

    @property
    def model_name(self) -> str:
        """The SLM's name."""
        slm = model_of(self.model)
        return slm if isinstance(slm, str) else slm.name

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """Everything that changes the output; the remaining budget is no part of it (this is the cache's key)."""
        return {
            **self._settings({}).described(),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "max_thinking_tokens": self.max_thinking_tokens,
            "stop": self.stop,
            "seed": self.seed,
        }

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """The cache's key; who asks, on which budget and beside whom, is no part of it."""
        own = list(_listed(_given(stop, self.stop))) or None  # LangChain's would hide the model's own stop strings
        return super()._get_llm_string(stop=own, **foreign(kwargs))

    def _convert_cached_generations(self, cache_val: list[CachedGeneration]) -> list[ChatGeneration]:
        """Called on a cache hit: the answer is free, and its metadata and the ledger say so."""
        return answers.cached(super()._convert_cached_generations(cache_val), self.ledger)

    def _resolve_model_profile(self) -> ModelProfile:
        """What LangChain may ask of this model: text and tools, within the window of a config on this disk."""
        return profile_of(model_of(self.model), self.max_tokens, self.model_kwargs)

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = answers.PROVIDER
        params["ls_model_name"] = without_secrets(str(kwargs.get("model") or self.model_name))
        params["ls_temperature"] = _given(kwargs.get("temperature"), self.temperature)
        params["ls_max_tokens"] = _given(kwargs.get("max_tokens"), self.max_tokens)
        return params

    def get_token_ids(self, text: str) -> list[int]:
        """The text in this model's own tokens; reads no weights."""
        return self.runtimes.encoder(self._settings({})).text_ids(text)

    def get_num_tokens_from_messages(
        self,
        messages: list[BaseMessage],
        tools: Sequence[Mapping[str, Any] | type | Callable[..., Any] | BaseTool] | None = None,
    ) -> int:
        """Tokens of the conversation as the chat template writes it; reads no weights.

        Part of a conversation that no template takes, such as a tool's result without its call, is counted as text.
        """
        encoder = self.runtimes.encoder(self._settings({}))
        return tokens_of_messages(encoder, messages, openai_tools(tools or (), strict=None))

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | bool | dict[str, Any] | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Tools for the model to call, in any form that LangChain converts.

        Args:
            tools: functions, tools, pydantic classes or schemas.
            tool_choice: "auto", "any" (also "required", True), "none", a tool's name, or OpenAI's mapping of it.
            strict: make every argument required, as OpenAI's strict mode does; schemas are kept to in any case.
            kwargs: bound to the call, such as ``response_format`` and ``parallel_tool_calls``.

        Raises:
            BadSchema: something that is no tool, or a schema that no grammar can express.
            ConfigError: a tool choice that fits no tool, an unknown response format or an unknown argument.
        """
        check_call(kwargs, type(self).model_fields)
        call = {**kwargs, "tools": openai_tools(tools, strict=strict)}
        if tool_choice is not None:
            call["tool_choice"] = tool_choice
        Request.of(call).check()
        return self.bind(**call)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: Method = "function_calling",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """A model whose answers are objects of a schema; see ``structured_output.structured``."""
        if kwargs:
            raise ConfigError(f"with_structured_output takes no {', '.join(kwargs)}.")
        return structured(self, schema, method=method, include_raw=include_raw, strict=strict)

    # Whole and streamed, sync and async answers drain one generator of steps.

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        *_, answer = on_behalf(CallScope(), self._whole(messages, stop, kwargs))
        assert isinstance(answer, ChatResult)
        return answer

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        async with aclosing(in_threads(on_behalf(CallScope(), self._whole(messages, stop, kwargs)))) as steps:
            return await anext(steps)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        caller = CallScope()
        for chunk in on_behalf(caller, self._chunks(messages, stop, kwargs)):
            if isinstance(chunk, ChatGenerationChunk):
                if run_manager:
                    with calling(caller):
                        run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        caller = CallScope()

        async def tell(chunk: ChatGenerationChunk) -> None:
            assert run_manager is not None
            with calling(caller):
                await run_manager.on_llm_new_token(chunk.text, chunk=chunk)

        return in_threads(on_behalf(caller, self._chunks(messages, stop, kwargs)), tell if run_manager else None)

    def _generate_with_cache(self, *args: Any, **kwargs: Any) -> ChatResult:
        with calling(CallScope()):  # LangChain may stream inside, and tells callbacks of it
            return super()._generate_with_cache(*args, **kwargs)

    async def _agenerate_with_cache(self, *args: Any, **kwargs: Any) -> ChatResult:
        with calling(CallScope()):
            return await super()._agenerate_with_cache(*args, **kwargs)

    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:
        """As LangChain's; what its callbacks call meanwhile shares this stream's slot."""
        return on_behalf(CallScope(), super().stream(input, config, stop=stop, **kwargs))  # type: ignore[arg-type]

    def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        """As LangChain's; what its callbacks call meanwhile shares this stream's slot."""
        return AsyncOnBehalf(CallScope(), super().astream(input, config, stop=stop, **kwargs))  # type: ignore[arg-type]

    # ------------------------------------------------------------------ one call

    def _whole(
        self, messages: list[BaseMessage], stop: list[str] | None, call: Mapping[str, Any]
    ) -> Generator[ChatResult | Place | None, None, None]:
        """Its place, if it must wait; None after every step, where an async caller can leave; then the answer."""
        generation = self._begin(messages, stop, call)
        for each in generation.deltas():
            yield each if isinstance(each, Place) else None
        yield answers.whole(generation)

    def _chunks(
        self, messages: list[BaseMessage], stop: list[str] | None, call: Mapping[str, Any]
    ) -> Generator[ChatGenerationChunk | Place | None, None, None]:
        """Its place, if it must wait; what every step adds, None where it shows nothing; numbers come last, alone."""
        generation = self._begin(messages, stop, call)
        for each in generation.deltas():
            yield each if isinstance(each, Place) else answers.piece(each)
        yield answers.last(generation)

    def _begin(self, messages: list[BaseMessage], stop: list[str] | None, call: Mapping[str, Any]) -> Generation:
        """Everything that can be refused is refused here; the model has not run yet."""
        check_call(call, type(self).model_fields)
        request = Request.of(call)
        ready = self.runtimes.get(self._settings(call))
        engine = ready.engine
        budget, scope = budget_of(call, self.budget), cache_scope_of(call, self.cache_scope)
        if engine.escalation is not None:
            engine.escalation.check_price(budget)
        sampling = self._sampling(call, banned_first=tuple(engine.slm.eos_ids))
        task = ready.task(
            request,
            messages,
            sampling.max_tokens,
            max_thinking_tokens=thinking_limit(_given(call.get("max_thinking_tokens"), self.max_thinking_tokens)),
            template_args=template_args_of(call),
        )
        account = Account(
            model=engine.slm.name,
            prompt_tokens=len(task.prompt),
            caller=current_caller(call.get("s2t_agent")),
            llm=engine.escalation.llm.name if engine.escalation else None,
            device_price=self.device_price,
            budget=budget,
        )
        watch, unfinished = self.on_step, unfinished_of(call)
        key = conversation_key(engine.slm.name, request.key, messages)
        begun = unfinished.begin(key, engine.slm.vocab_size) if unfinished is not None else NOTHING
        steps = engine.run(
            task.prompt,
            sampling,
            grammar=task.grammar,
            budget=budget,
            cache_scope=scope,
            on_asked=account.asked,
            begun=begun.tokens,
        )
        return Generation(
            steps if unfinished is None else unfinished.watching(key, begun, steps, account),
            account,
            parser=task.parser,
            tokenizer=engine.slm.tokenizer,
            eos_ids=engine.slm.eos_ids,
            room=task.room,
            checks=task.checks,
            thoughts=task.thoughts,
            stop=_listed(_given(stop, self.stop)),
            ledger=self.ledger,
            watch=(lambda step: watch(account.trace_id, step)) if watch else None,
        )


def _listed(stop: str | Sequence[str] | None) -> Sequence[str]:
    return [stop] if isinstance(stop, str) else stop or ()


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value
