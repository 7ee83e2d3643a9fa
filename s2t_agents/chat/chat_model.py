"""``ChatS2T``: a LangChain chat model with a local SLM, a selector at unsure tokens and an LLM within a budget.

messages + tools -> PromptEncoder -> token ids -> Engine.run() -> Generation -> AIMessage / chunks
                                                                     └-> Account -> response_metadata, Ledger
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun, Callbacks
from langchain_core.language_models import LanguageModelInput, ModelProfile
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.outputs import Generation as CachedGeneration
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from pydantic import (
    ConfigDict,
    Field,
    FieldSerializationInfo,
    SecretStr,
    SkipValidation,
    ValidationError,
    field_serializer,
)

from ..backends.loading import options_for_other_model
from ..budget import Budget, DevicePrice
from ..call_scope import CallScope, in_scope, scoped_items
from ..engine.engine import Engine
from ..errors import ConfigError
from ..escalation import Escalation
from ..formats.reasoning import parse_max_thinking_tokens
from ..identity import identity
from ..ledger import Ledger
from ..llms import LLMSelector
from ..redaction import url_without_secrets, without_secrets
from ..scheduling.admission import AdmissionTicket, Concurrency
from ..scheduling.computing import computing
from ..scheduling.language_model import LanguageModel
from ..selectors import Selector
from ..tokenization.chat_template import chat_template_of
from ..triggers import Trigger
from ..types import Sampling, Step
from . import output_messages
from .answer import AnswerContext, begin_answer
from .asked_conversation import AskedConversation
from .async_bridge import ThreadedIterator
from .attribution import current_caller, with_caller_handler
from .cached_answers import CutByBudget, cached_generations
from .call_arguments import (
    ConfigurableChatModel,
    budget_of,
    cache_scope_of,
    check_call,
    settings_error,
    template_args_of,
    timeout_of,
    top_logprobs_of,
    unfinished_of,
    without_nones,
    without_own_arguments,
)
from .engine_settings import EngineSettings, escalation_of, model_of
from .generation import Generation
from .local_work import LocalWork
from .logprobs import LogprobsReader
from .model_profile import profile_of
from .response_options import ResponseOptions, openai_tools, with_schema
from .runtime import Runtime, RuntimeCache
from .structured_output import Method, structured
from .telemetry_messages import input_messages
from .token_count import tokens_of_messages
from .unfinished_answers import EMPTY_ANSWER, conversation_key

_MAY_HOLD_SECRETS = ("model_kwargs", "template_args", "metadata")
"""Dicts of the user's, which may hold secrets: redacted in dumps, pickles and reprs."""
_MAY_BE_URLS = ("model", "selector", "escalation")


class ChatS2T(ConfigurableChatModel):
    """A local chat model whose tokens are re-ranked by a selector, or by an LLM, at steps where it is unsure.

    With neither ``selector`` nor ``escalation`` it is a plain local chat model for any Hugging Face checkpoint or GGUF
    file.

    >>> llm = ChatS2T(selector="s2t-demo", escalation=LocalLLM("s2t-demo-llm"), budget=Budget(escalations=3))
    >>> llm.invoke("Ann has 37 shells and finds 48 more. How many are there now?").response_metadata["s2t"]

    Args:
        model: directory, hub id or GGUF file of the SLM ("s2t-demo" is bundled), ``vllm://host:port/name`` of one on a
            server, or a loaded ``LanguageModel``.
        selector: directory of a trained selector ("s2t-demo" for the bundled one), "server" for the one that runs in
            the model's server, or any ``Selector``.
        escalation: the LLM to ask where the selector is unsure too: its name or address, a LangChain chat model, a
            ``LocalLLM``, ``OpenAILLM`` or ``ChatJudge``; or an ``Escalation`` with its own margin.
        budget: limits what escalations, and answers themselves, spend; a call's ``s2t_budget`` overrides it.
        ledger: receives one record per generation.
        k: candidates per triggered step, 1 to 64; None takes the selector's, or 8.
        trigger: decides which steps are re-ranked; None takes the selector's calibrated one, without a selector
            ``entropy(above=0.5)`` (nats), at which a general model asks often.
        temperature: 0 is greedy.
        top_p: nucleus mass, used when temperature is above 0.
        max_tokens: limit of one answer in tokens, its reasoning included.
        max_thinking_tokens: limit of the reasoning before an answer, in tokens; it is closed there and the answer
            follows. 0 closes it at once; None sets no limit besides ``max_tokens``. A call may override it.
        stop: stop strings.
        seed: of sampling.
        device: "cpu", "cuda:1", ...; None chooses.
        dtype: "bfloat16", ...; None chooses.
        device_price: USD per hour of the SLM's device; None leaves the local cost unknown.
        concurrency: how many generations run at once and how many may queue.
        cache_scope: the prefix cache is shared within one scope only; give each tenant its own.
            A call's ``s2t_cache_scope``, or the enclosing node's ``configurable``, overrides it.
        model_kwargs: passed to ``from_pretrained``, such as ``revision`` or ``quantization_config``, to llama.cpp
            (``n_ctx``, ...) or to the server's client (``tokenizer``, ``api_key_env``, ...). Another model that a call
            names gets those alone that its own engine takes (llama.cpp's go to no checkpoint), without ``revision``,
            ``subfolder``, ``trust_remote_code``, ``gguf_file`` and, unless it is a server's, ``tokenizer``.
        chat_template: replaces the tokenizer's: a Jinja template (a text with a brace or a line break in it), or the
            path of a file that holds one, which is read at construction.
        template_args: variables of the chat template, such as ``{"enable_thinking": False}``; a call may override
            them.
        on_step: called with the trace id and every step, for traces.
        shadow: every token is the SLM's own. Selector and LLM are asked all the same, within the budget; what they
            would have changed, and what it cost, is in ``response_metadata["s2t"]["shadow"]`` and in the ledger.
        streaming: True streams under ``invoke`` too, for LangChain callbacks that need tokens.
        timeout: seconds that an answer may take from the call to its last token, waiting in the queue, the prompt and
            questions to the LLM included, loading the weights not: then ``AnswerTimeout``, within a step. A call may
            override it; None sets no limit.
        api_key, max_retries: accepted and unused, so that settings of a hosted model need no change.
        runtimes: cache of engines; copies of the model share it.

    Raises:
        ConfigError: an invalid setting; files are checked at the first call, everything else here.
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
    shadow: bool = False
    streaming: bool | None = None
    api_key: SecretStr | None = Field(default=None, exclude=True, repr=False)
    max_retries: int | None = None
    timeout: SkipValidation[float | None] = None
    runtimes: RuntimeCache = Field(default_factory=RuntimeCache, exclude=True, repr=False)
    callbacks: Callbacks = Field(default=None, exclude=True, repr=False)

    if not TYPE_CHECKING:  # type checkers derive the signature from the fields

        def __init__(self, **settings: Any) -> None:
            fields = type(self).model_fields
            try:
                super().__init__(**without_nones(settings, fields))
            except ValidationError as error:
                raise settings_error(error, fields) from None
            self.chat_template = chat_template_of(self.chat_template)
            self._check()  # here, not in a validator: pydantic would wrap our errors in its own
            self.callbacks = with_caller_handler(self.callbacks)

    # ------------------------------------------------------------------ settings

    def _check(self) -> None:
        self._sampling({})
        parse_max_thinking_tokens(self.max_thinking_tokens)
        self.timeout = timeout_of(self.timeout)
        settings = self._settings({})
        settings.check()
        self.runtimes.keep(settings)
        if (escalation := escalation_of(self.escalation)) is not None:
            escalation.check_price(self.budget)

    def _sampling(self, call: Mapping[str, Any], banned_first: Sequence[int] = ()) -> Sampling:
        """Sampling parameters of one call: its arguments, else the model's settings."""
        return Sampling(
            temperature=_value_or(call.get("temperature"), self.temperature),
            top_p=_value_or(call.get("top_p"), self.top_p),
            seed=_value_or(call.get("seed"), self.seed),
            max_tokens=_value_or(call.get("max_tokens"), self.max_tokens),
            banned_first=banned_first,
            logprobs=top_logprobs_of(call),
        )

    def _settings(self, call: Mapping[str, Any]) -> EngineSettings:
        """Engine settings of one call.

        If the call names another model (``model=``), that one runs without the selector, which was trained for this
        model, and never escalates to itself.
        """
        slm = model_of(self.model)
        model = model_of(_value_or(call.get("model"), slm))
        own = model == slm
        escalation = escalation_of(self.escalation)
        to_itself = not own and escalation is not None and escalation.llm.name == model
        options = self.model_kwargs
        if not own:
            options = {} if isinstance(model, LanguageModel) else options_for_other_model(model, options)
        return EngineSettings(
            model=model,
            selector=self.selector if own else None,
            escalation=None if to_itself else self.escalation,
            k=self.k,
            trigger=self.trigger,
            device=self.device,
            dtype=self.dtype,
            model_kwargs=options,
            template_args=self.template_args,
            chat_template=chat_template_of(self.chat_template) if own else None,
            concurrency=self.concurrency,
            shadow=self.shadow,
        )

    @property
    def runtime(self) -> Runtime:
        """This model's engine and prompt encoder; the first access loads the weights."""
        return self.runtimes.get(self._settings({}))

    @property
    def engine(self) -> Engine:
        """This model's engine; the first access loads the weights."""
        return self.runtime.engine

    def __getstate__(self) -> dict[Any, Any]:
        """Pickles as its settings, without keys, tokens and passwords; engines are loaded again by name when needed.

        Where it is unpickled, the hub token comes from that machine's environment or login.
        """
        state = super().__getstate__()
        clean = {name: without_secrets(getattr(self, name)) for name in _MAY_HOLD_SECRETS}
        clean |= {name: url_without_secrets(getattr(self, name)) for name in _MAY_BE_URLS}
        clean["model"] = url_without_secrets(self.model_name)
        return {**state, "__dict__": {**state["__dict__"], "api_key": None, **clean}}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """As ``__init__``: the engine of its own settings is kept."""
        super().__setstate__(state)
        self.runtimes.keep(self._settings({}))

    @field_serializer(*_MAY_HOLD_SECRETS)
    def _serialize_without_secrets(self, value: Any, info: FieldSerializationInfo) -> Any:
        return _as_json(without_secrets(value)) if info.mode_is_json() else without_secrets(value)

    @field_serializer(*_MAY_BE_URLS)
    def _serialize_url_without_secrets(self, value: Any, info: FieldSerializationInfo) -> Any:
        return _as_json(value) if info.mode_is_json() else url_without_secrets(value)

    @field_serializer("trigger", "dtype", when_used="json")
    def _serialize_by_name(self, value: Any) -> Any:
        return _as_json(value)

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        return [(name, without_secrets(value)) for name, value in super().__repr_args__()]

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> ChatS2T:
        """A copy over the same weights, budget and ledger, so that copying an agent does not double its budget."""
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
    @computing  # a selector object's hash, a model's dtype
    def _identifying_params(self) -> dict[str, Any]:
        """Everything that changes the output; the key of LangChain's cache, so without the remaining budget."""
        return {
            **self._settings({}).identifying_params(),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "max_thinking_tokens": self.max_thinking_tokens,
            "stop": self.stop,
            "seed": self.seed,
        }

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """The key of LangChain's cache, without agent, budget, cache scope and earlier tries."""
        own = list(as_list(_value_or(stop, self.stop))) or None  # LangChain's would hide the model's own stop strings
        return super()._get_llm_string(stop=own, **identity(with_schema(without_own_arguments(kwargs))))

    def _convert_cached_generations(self, cache_val: list[CachedGeneration]) -> list[ChatGeneration]:
        """Called on a cache hit: metadata and ledger record a cost of zero.

        Raises:
            CutByBudget: another caller's budget ended the answer.
        """
        return cached_generations(super()._convert_cached_generations(cache_val), self.ledger)

    def _resolve_model_profile(self) -> ModelProfile:
        """LangChain's model profile: text, tools, reasoning; what the files on disk do not say is left out."""
        return profile_of(
            model_of(self.model), self.max_tokens, self.model_kwargs, chat_template_of(self.chat_template)
        )

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = output_messages.PROVIDER
        params["ls_model_name"] = without_secrets(str(kwargs.get("model") or self.model_name))
        params["ls_temperature"] = _value_or(kwargs.get("temperature"), self.temperature)
        params["ls_max_tokens"] = _value_or(kwargs.get("max_tokens"), self.max_tokens)
        return params

    def get_token_ids(self, text: str) -> list[int]:
        """The text in this model's token ids, none added, or what ``custom_get_token_ids`` says; reads no weights.

        Args:
            text: any; control tokens in it are text.

        Raises:
            InputError: text that is not Unicode.
        """
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return self.runtimes.encoder(self._settings({})).text_ids(text)

    def get_num_tokens_from_messages(
        self,
        messages: list[BaseMessage],
        tools: Sequence[Mapping[str, Any] | type | Callable[..., Any] | BaseTool] | None = None,
    ) -> int:
        """Number of tokens of the conversation as the chat template renders it; reads no weights.

        What the template cannot render by itself, such as a tool result without its call, is counted as text.
        ``custom_get_token_ids`` plays no part: it knows no template.
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
        """Bind tools, in any form that LangChain converts.

        Args:
            tools: functions, tools, pydantic classes or schemas.
            tool_choice: "auto", "any" (also "required", True), "none", a tool's name, or OpenAI's, Anthropic's or
                Bedrock's mapping.
            strict: make every argument required, as OpenAI's strict mode does; schemas are enforced in any case.
            kwargs: bound to the call, such as ``response_format`` and ``parallel_tool_calls``.

        Raises:
            BadSchema: not a tool, or a schema that no grammar can express.
            ConfigError: a tool choice that names no tool, an unknown response format or an unknown argument.
        """
        check_call(kwargs, type(self).model_fields)
        call = {**kwargs, "tools": openai_tools(tools, strict=strict)}
        if tool_choice is not None:
            call["tool_choice"] = tool_choice
        ResponseOptions.of(call).check()
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
        """A runnable whose output fits a schema; see ``structured_output.structured``."""
        if kwargs:
            raise ConfigError(f"with_structured_output takes no {', '.join(kwargs)}.")
        return structured(self, schema, method=method, include_raw=include_raw, strict=strict)

    # invoke and stream, sync and async, drain one generator of steps.

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        *_, answer = scoped_items(CallScope(), self._result_items(messages, stop, kwargs))
        assert isinstance(answer, ChatResult)
        return answer

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        async with aclosing(
            ThreadedIterator(scoped_items(CallScope(), self._result_items(messages, stop, kwargs)))
        ) as steps:
            return await anext(steps)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        caller = CallScope()
        for chunk in scoped_items(caller, self._chunk_items(messages, stop, kwargs)):
            if isinstance(chunk, ChatGenerationChunk):
                if run_manager:
                    with in_scope(caller):
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
            with in_scope(caller):
                await run_manager.on_llm_new_token(chunk.text, chunk=chunk)

        return ThreadedIterator(
            scoped_items(caller, self._chunk_items(messages, stop, kwargs)), tell if run_manager else None
        )

    def _generate_with_cache(self, *args: Any, **kwargs: Any) -> ChatResult:
        with in_scope(CallScope()):  # LangChain may stream inside and call callbacks with the chunks
            try:
                return super()._generate_with_cache(*args, **kwargs)
            except CutByBudget:
                return self._without_cache()._generate_with_cache(*args, **kwargs)

    async def _agenerate_with_cache(self, *args: Any, **kwargs: Any) -> ChatResult:
        with in_scope(CallScope()):
            try:
                return await super()._agenerate_with_cache(*args, **kwargs)
            except CutByBudget:
                return await self._without_cache()._agenerate_with_cache(*args, **kwargs)

    def _without_cache(self) -> Self:
        return self.model_copy(update={"cache": False})

    # ------------------------------------------------------------------ one call

    def _result_items(
        self, messages: list[BaseMessage], stop: list[str] | None, call: Mapping[str, Any]
    ) -> Generator[ChatResult | AdmissionTicket | None, None, None]:
        """A ticket while queued, None after every step (so that an async caller can cancel), then the result."""
        generation = self._start(messages, stop, call)
        yield from generation.run()
        yield output_messages.chat_result(generation, LogprobsReader(generation, bool(call.get("logprobs"))).new())

    def _chunk_items(
        self, messages: list[BaseMessage], stop: list[str] | None, call: Mapping[str, Any]
    ) -> Generator[ChatGenerationChunk | AdmissionTicket | None, None, None]:
        """A ticket while queued, then a chunk per step (None for an empty one), then a chunk with the metadata."""
        generation = self._start(messages, stop, call, streamed=True)
        logprobs = LogprobsReader(generation, bool(call.get("logprobs")))
        for each in generation.deltas():
            yield each if isinstance(each, AdmissionTicket) else output_messages.message_chunk(each, logprobs.new())
        yield output_messages.final_chunk(generation)

    @computing
    def _start(
        self, messages: list[BaseMessage], stop: list[str] | None, call: Mapping[str, Any], *, streamed: bool = False
    ) -> Generation:
        """Validate the call and build its generation; the model does not run yet."""
        check_call(call, type(self).model_fields)
        options = ResponseOptions.of(call)
        runtime = self.runtimes.get(self._settings(call))
        engine = runtime.engine
        timeout = timeout_of(_value_or(call.get("timeout"), self.timeout))
        budget, scope = budget_of(call, self.budget), cache_scope_of(call, self.cache_scope)
        if engine.escalation is not None:
            engine.escalation.check_price(budget)
        sampling = self._sampling(call, banned_first=tuple(engine.slm.eos_ids))
        thinking_limit = _value_or(call.get("max_thinking_tokens"), self.max_thinking_tokens)
        unfinished, key = unfinished_of(call), conversation_key(engine.slm.name, options.cache_key, messages)
        begun = unfinished.begin(key, engine.slm.vocab_size) if unfinished is not None else EMPTY_ANSWER
        work = LocalWork(budget, begun.tokens, timeout_s=timeout)
        try:
            request = runtime.prepare(
                options,
                messages,
                sampling.max_tokens,
                work,
                stop=as_list(_value_or(stop, self.stop)),
                max_thinking_tokens=parse_max_thinking_tokens(thinking_limit),
                template_args=template_args_of(call),
            )
        except BaseException:
            work.release()
            raise
        caller = current_caller(call.get("s2t_agent"), call.get("s2t_thread"))
        return begin_answer(
            engine,
            request,
            sampling,
            AnswerContext(caller, work, budget, scope, self.device_price, self.ledger, self.on_step),
            operation="chat",
            streamed=streamed,
            messages=lambda: input_messages(messages),
            conversation=AskedConversation(
                options.prompt(messages),
                options.tools,
                len(request.prompt),
                thinking=request.thoughts is not None and request.thoughts.thinking,
            ),
            recording=partial(unfinished.recording, key, begun) if unfinished is not None else None,
        )


def as_list(stop: str | Sequence[str] | None) -> Sequence[str]:
    """Stop strings as they may be given, as a sequence."""
    return [stop] if isinstance(stop, str) else stop or ()


def _value_or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _as_json(value: Any) -> Any:
    """A setting as JSON has it, without secrets: of an object what tells it from others, as in cache keys."""
    return without_secrets(identity(value))
