"""``ChatS2T``: a LangChain chat model that runs here, looks twice where it is unsure, and asks within a budget.

messages + tools -> PromptEncoder -> token ids -> Engine.steps() -> Generation -> AIMessage / chunks
                                                                       └-> Account -> response_metadata, Ledger
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from langchain_core.callbacks import BaseCallbackManager, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import ConfigDict, Field, PrivateAttr, SecretStr

from . import runtime
from .accounting import Account
from .attribution import CallerHandler, configurable, current_caller
from .budget import Budget, DevicePrice
from .engine.steps import MAX_K, Engine
from .errors import ConfigError, ContextOverflow
from .escalation import Escalation
from .generation import Generation
from .ledger import Ledger
from .models.language_model import LanguageModel
from .selectors import LLMSelector, LocalLLM
from .tool_calls import Delta
from .triggers import Trigger
from .types import Sampling, Step

PROVIDER = "s2t"


class ChatS2T(BaseChatModel):
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
        max_tokens: limit of one answer, in tokens.
        stop: stop strings.
        seed: of sampling.
        device: "cpu", "cuda:1", ...; None chooses.
        dtype: "bfloat16", ...; None chooses.
        device_price: USD per hour of the SLM's device; None leaves the local cost unknown.
        model_kwargs: passed to ``from_pretrained``, such as ``quantization_config``.
        template_args: variables of the chat template, such as ``{"enable_thinking": False}``.
        on_step: called with the trace id and every step, for traces.
        streaming: True generates by streaming under ``invoke`` too, as LangChain's callbacks may want.
        api_key, max_retries, timeout: accepted and unused, so that settings written for a hosted model can stay.

    Raises:
        ConfigError: a setting that can not work; everything but the files is checked here, files at the first call.
        UnpricedModel: a dollar budget over an LLM without a price.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", protected_namespaces=())

    model: str | LanguageModel = "s2t-demo"
    selector: Any = None
    escalation: Any = None
    budget: Budget | None = Field(default=None, exclude=True)
    ledger: Ledger | None = Field(default=None, exclude=True)
    k: int | None = None
    trigger: Any = None
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 512
    stop: list[str] | None = None
    seed: int | None = None
    device: str | None = None
    dtype: Any = None
    device_price: DevicePrice | None = None
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    template_args: dict[str, Any] = Field(default_factory=dict)
    on_step: Callable[[str, Step], None] | None = Field(default=None, exclude=True)
    streaming: bool | None = None
    api_key: SecretStr | None = Field(default=None, exclude=True)
    max_retries: int | None = None
    timeout: float | None = None

    _runtime: runtime.Runtime | None = PrivateAttr(default=None)
    _lock: Any = PrivateAttr(default_factory=threading.Lock)

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._check()  # here, not in a validator: pydantic would wrap our errors in its own
        self._listen()

    # ------------------------------------------------------------------ settings

    def _check(self) -> None:
        self._sampling({})
        if self.k is not None and not 1 <= self.k <= MAX_K:
            raise ConfigError(f"k is {self.k}; between 1 and {MAX_K} candidates can be scored at a step.")
        if self.trigger is not None and not isinstance(self.trigger, Trigger):
            raise ConfigError(f"trigger is a {type(self.trigger).__name__}.", hint="Take one of s2t_agents.triggers.")
        if (
            self.selector is not None
            and not isinstance(self.selector, (str, Path))
            and not hasattr(self.selector, "scores")
        ):
            raise ConfigError(f"selector is a {type(self.selector).__name__}.", hint="Give a directory or a Selector.")
        runtime.torch_dtype(self.dtype)
        if (escalation := self._escalation) is not None:
            escalation.check_price(self.budget)

    def _listen(self) -> None:
        """Put the handler that learns who is calling among this model's own callbacks."""
        handlers = self.callbacks
        if isinstance(handlers, BaseCallbackManager):
            handlers.add_handler(CallerHandler(), inherit=False)
        elif not any(isinstance(handler, CallerHandler) for handler in handlers or []):
            self.callbacks = [*(handlers or []), CallerHandler()]

    @property
    def _escalation(self) -> Escalation | None:
        """``escalation`` as an ``Escalation``: a path or an LLM alone takes the calibrated margin."""
        given = self.escalation
        if given is None or isinstance(given, Escalation):
            return given
        if isinstance(given, str):
            return Escalation(LocalLLM(given))
        if hasattr(given, "open") and hasattr(given, "check"):
            llm: LLMSelector = given
            return Escalation(llm)
        raise ConfigError(f"escalation is a {type(given).__name__}.", hint="Give an LLM (LocalLLM, ...) or Escalation.")

    def _sampling(self, call: Mapping[str, Any], banned_first: Sequence[int] = ()) -> Sampling:
        """Sampling of one call: its own arguments before the model's."""
        return Sampling(
            temperature=_given(call.get("temperature"), self.temperature),
            top_p=_given(call.get("top_p"), self.top_p),
            seed=_given(call.get("seed"), self.seed),
            max_tokens=_given(call.get("max_tokens"), self.max_tokens),
            banned_first=banned_first,
        )

    def _ready(self) -> runtime.Runtime:
        """The engine and its weights, loaded on first use."""
        with self._lock:
            if self._runtime is None:
                slm = runtime.shared_model(self.model, device=self.device, dtype=self.dtype, options=self.model_kwargs)
                self._runtime = runtime.build(
                    slm,
                    k=self.k,
                    trigger=self.trigger,
                    selector=self.selector,
                    escalation=self._escalation,
                    template_args=self.template_args,
                )
            return self._runtime

    @property
    def engine(self) -> Engine:
        """The engine under this model; reading it loads the weights."""
        return self._ready().engine

    # ------------------------------------------------------------------ LangChain

    @property
    def _llm_type(self) -> str:
        return "chat-s2t"

    @property
    def model_name(self) -> str:
        """The SLM's name."""
        return self.model if isinstance(self.model, str) else self.model.name

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """Everything that changes the output; the remaining budget is no part of it (this is the cache's key)."""
        return {
            "model": self.model_name,
            "selector": str(self.selector),
            "escalation": repr(self._escalation),
            "k": self.k,
            "trigger": repr(self.trigger),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "stop": self.stop,
            "seed": self.seed,
            "dtype": str(self.dtype),
        }

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = PROVIDER
        params["ls_model_name"] = str(kwargs.get("model") or self.model_name)
        params["ls_temperature"] = _given(kwargs.get("temperature"), self.temperature)
        params["ls_max_tokens"] = _given(kwargs.get("max_tokens"), self.max_tokens)
        return params

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Tools for the model to call, in any form that LangChain converts.

        Args:
            tools: functions, tools, pydantic classes or schemas.
            tool_choice: "auto", "any", "none" or a tool's name.
            kwargs: bound to the call.
        """
        formatted = [convert_to_openai_tool(tool) for tool in tools]
        if tool_choice is not None:
            kwargs["tool_choice"] = tool_choice
        return super().bind(tools=formatted, **kwargs)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        generation = self._begin(messages, stop, kwargs)
        for _ in generation.deltas():
            pass
        parser = generation.parser
        message = AIMessage(
            content=parser.text,
            tool_calls=parser.tool_calls,
            invalid_tool_calls=parser.invalid_tool_calls,
            usage_metadata=_usage(generation.account),
            response_metadata=self._response_metadata(generation),
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        generation = self._begin(messages, stop, kwargs)
        for delta in generation.deltas():
            chunk = ChatGenerationChunk(message=_chunk(delta))
            if run_manager:
                run_manager.on_llm_new_token(delta.text, chunk=chunk)
            yield chunk
        last = AIMessageChunk(
            content="",
            usage_metadata=_usage(generation.account),
            response_metadata=self._response_metadata(generation),
            chunk_position="last",
        )
        yield ChatGenerationChunk(message=last)

    # ------------------------------------------------------------------ one call

    def _begin(self, messages: list[BaseMessage], stop: list[str] | None, call: Mapping[str, Any]) -> Generation:
        """Everything that can be refused is refused here; the model has not run yet."""
        ready = self._ready()
        engine = ready.engine
        budget = call.get("s2t_budget") or configurable("s2t_budget") or self.budget
        if engine.escalation is not None:
            engine.escalation.check_price(budget)
        sampling = self._sampling(call, banned_first=tuple(engine.slm.eos_ids))
        prompt = ready.encoder.encode(messages, call.get("tools") or (), limit=engine.slm.context_window - 1)
        account = Account(
            model=self.model_name,
            prompt_tokens=len(prompt),
            caller=current_caller(call.get("s2t_agent")),
            llm=engine.escalation.llm.name if engine.escalation else None,
            device_price=self.device_price,
            budget=budget,
        )
        watch = self.on_step
        room = min(sampling.max_tokens, engine.slm.context_window - len(prompt))
        compiled = ready.grammar(call)
        if compiled and room < sampling.max_tokens and room < compiled.fewest_tokens:
            raise ContextOverflow(
                f"the prompt has {len(prompt)} tokens and leaves {room} of the context window; the shortest legal "
                f"answer has {compiled.fewest_tokens}.",
                hint="Shorten the conversation or the tools.",
            )
        grammar = compiled.start(room) if compiled else None
        return Generation(
            engine.steps(prompt, sampling, grammar=grammar, budget=budget),
            account,
            tokenizer=engine.slm.tokenizer,
            eos_ids=engine.slm.eos_ids,
            room=room,
            stop=stop if stop is not None else self.stop or (),
            ledger=self.ledger,
            watch=(lambda step: watch(account.trace_id, step)) if watch else None,
        )

    def _response_metadata(self, generation: Generation) -> dict[str, Any]:
        return {
            "model_name": self.model_name,
            "model_provider": PROVIDER,
            "finish_reason": generation.finish_reason,
            "s2t": generation.account.metadata(),
        }


def _usage(account: Account) -> UsageMetadata:
    written = len(account.steps)
    return UsageMetadata(
        input_tokens=account.prompt_tokens, output_tokens=written, total_tokens=account.prompt_tokens + written
    )


def _chunk(delta: Delta) -> AIMessageChunk:
    return AIMessageChunk(content=delta.text, tool_call_chunks=delta.tool_call_chunks)


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value
