"""Arguments of one call: which ones exist, which override settings, and how ``configurable`` reaches them.

LangChain passes a model only the callbacks, tags and metadata of a call's config, so the entries of ``configurable``
are copied into the call's arguments first.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from numbers import Real
from typing import TYPE_CHECKING, Any

from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.runnables import RunnableConfig, ensure_config
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from ..budget import Budget
from ..call_scope import CallScope, ScopedAsyncIterator, scoped_items
from ..errors import ConfigError
from .attribution import configurable
from .unfinished_answers import Unfinished

OWN_ARGUMENTS = ("s2t_agent", "s2t_thread", "s2t_budget", "s2t_cache_scope", "s2t_unfinished")
"""Agent, thread, budget, cache scope and earlier tries: they change no answer, so they are in no trace or cache key."""

MODEL_ARGUMENTS = (
    "logprobs",
    "max_tokens",
    "max_thinking_tokens",
    "model",
    "parallel_tool_calls",
    "response_format",
    "seed",
    "stop",
    "temperature",
    "template_args",
    "tool_choice",
    "tools",
    "top_logprobs",
    "top_p",
)
"""Arguments that change an answer."""

LANGCHAIN_ARGUMENTS = (
    "ls_structured_output_format",
    "stream",
    "stream_options",
    "stream_usage",
    "strict",
    "structured_output_format",
)
"""Arguments of LangChain or of other chat models that are accepted: they hold here anyway, or LangChain reads them."""

LIMITS = ("timeout",)
"""Limits of one call that change no answer: in no trace or cache key."""

CALL_NAME_OF_SETTING = {"budget": "s2t_budget", "cache_scope": "s2t_cache_scope"}
"""Settings of the model that have another name as arguments of a call."""

_NAMES_ELSEWHERE = {"max_completion_tokens": "max_tokens", "max_output_tokens": "max_tokens", "stop_sequences": "stop"}
"""Arguments of other chat models, to the ones here."""


class ConfigurableChatModel(BaseChatModel):
    """A chat model that reads ``configurable={"s2t_budget": ...}`` in every way in which LangChain calls a model.

    Calls made by the callbacks of a stream share the stream's slot in the engine.
    """

    def invoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **call: Any,
    ) -> AIMessage:
        """One answer."""
        return super().invoke(input, config, stop=stop, **with_configurable(config, call))

    async def ainvoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **call: Any,
    ) -> AIMessage:
        """One answer."""
        return await super().ainvoke(input, config, stop=stop, **with_configurable(config, call))

    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **call: Any,
    ) -> Iterator[AIMessageChunk]:
        """One answer, as it comes."""
        chunks = super().stream(input, config, stop=stop, **with_configurable(config, call))
        return scoped_items(CallScope(), chunks)  # type: ignore[arg-type]

    def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **call: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        """One answer, as it comes."""
        chunks = super().astream(input, config, stop=stop, **with_configurable(config, call))
        return ScopedAsyncIterator(CallScope(), chunks)  # type: ignore[arg-type]

    if not TYPE_CHECKING:  # LangChain's overloads stay what type checkers see

        def stream_events(self, input: Any, config: Any = None, **call: Any) -> Any:
            """The events of one answer."""
            return super().stream_events(input, config, **with_configurable(config, call))

        def astream_events(self, input: Any, config: Any = None, **call: Any) -> Any:
            """The events of one answer."""
            return super().astream_events(input, config, **with_configurable(config, call))

    def _get_invocation_params(self, stop: list[str] | None = None, **call: Any) -> dict[str, Any]:
        return super()._get_invocation_params(stop=stop, **without_own_arguments(call))


def with_configurable(config: RunnableConfig | None, call: Mapping[str, Any]) -> dict[str, Any]:
    """The call's arguments, with those ``OWN_ARGUMENTS`` added that are only in the config's ``configurable``.

    So is its ``thread_id``, LangGraph's name of a thread, but where the metadata have one.
    """
    known = ensure_config(config)
    found = dict(known.get("configurable", {}))
    if "thread_id" not in known.get("metadata", {}):
        found.setdefault("s2t_thread", found.get("thread_id"))
    given = {key: found[key] for key in OWN_ARGUMENTS if found.get(key) is not None and call.get(key) is None}
    return {**call, **given}


def without_own_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """The call's arguments without ``OWN_ARGUMENTS`` and ``LIMITS``."""
    return {key: value for key, value in call.items() if key not in OWN_ARGUMENTS and key not in LIMITS}


def without_nones(settings: Mapping[str, Any], fields: Mapping[str, FieldInfo]) -> dict[str, Any]:
    """A model's settings without each None whose default is another value: None means the default there."""
    return {
        name: value
        for name, value in settings.items()
        if value is not None or name not in fields or fields[name].default is None
    }


def settings_error(error: ValidationError, fields: Mapping[str, FieldInfo]) -> ConfigError:
    """A validation error of the model's settings in one line; values that may be secret are left out."""
    found = error.errors()[0]
    name = ".".join(map(str, found["loc"])) or "a setting"
    if found["type"] == "extra_forbidden":
        close = get_close_matches(name, fields, n=1)
        return ConfigError(f"ChatS2T takes no {name}.", hint=f"Did you mean {close[0]}?" if close else "")
    field = fields.get(str(found["loc"][0])) if found["loc"] else None
    shown = f"{found['input']!r:.200}" if field is not None and field.repr else "no such value"
    return ConfigError(f"{name} is {shown}: {found['msg']}.")


def check_call(call: Collection[str], settings: Collection[str]) -> None:
    """Refuse unknown arguments, which would have no effect.

    Args:
        call: names of the call's arguments.
        settings: names of the model's settings.

    Raises:
        ConfigError: naming the argument and the closest known one.
    """
    known = [*MODEL_ARGUMENTS, *LIMITS, *OWN_ARGUMENTS]
    for name in call:
        if name in known or name in LANGCHAIN_ARGUMENTS:
            continue
        if name in settings:
            way_out = (
                f"Per call, use {CALL_NAME_OF_SETTING[name]}."
                if name in CALL_NAME_OF_SETTING
                else f"Say it in ChatS2T({name}=...)."
            )
            raise ConfigError(f"{name} is a setting of the model, not of a call.", hint=way_out)
        close = [_NAMES_ELSEWHERE[name]] if name in _NAMES_ELSEWHERE else get_close_matches(name, known, n=1)
        raise ConfigError(
            f"{name} is no argument of a call.",
            hint=f"Did you mean {close[0]}?" if close else f"Calls take {', '.join(known)}.",
        )


_enclosing: ContextVar[Budget | None] = ContextVar("s2t_enclosing_budget", default=None)


@contextmanager
def within_budget(budget: Budget) -> Iterator[None]:
    """Calls in this block that name no budget, of models that have none, count against this one."""
    token = _enclosing.set(budget)
    try:
        yield
    finally:
        _enclosing.reset(token)


def budget_of(call: Mapping[str, Any], default: Budget | None) -> Budget | None:
    """The budget of one call.

    From its arguments, else the enclosing node's ``configurable``, else the model's, else of ``within_budget``.

    Raises:
        ConfigError: it is not a ``Budget``.
    """
    budget = _call_or_configurable(call, "s2t_budget", default if default is not None else _enclosing.get())
    if budget is None or isinstance(budget, Budget):
        return budget
    raise ConfigError(f"s2t_budget is {budget!r}; it must be a Budget.", hint="Say Budget(usd=..., escalations=...).")


def cache_scope_of(call: Mapping[str, Any], default: str | None) -> str | None:
    """The cache scope of one call: from its arguments, else the enclosing node's ``configurable``, else the model's.

    Raises:
        ConfigError: it is not a string.
    """
    scope = _call_or_configurable(call, "s2t_cache_scope", default)
    if scope is None or isinstance(scope, str):
        return scope
    raise ConfigError(f"s2t_cache_scope is {scope!r}; it must be a text.", hint="Give each tenant a name.")


def unfinished_of(call: Mapping[str, Any]) -> Unfinished | None:
    """The interrupted answers that one call may resume; None if it resumes none.

    Raises:
        ConfigError: it is not an ``Unfinished``.
    """
    found = _call_or_configurable(call, "s2t_unfinished", None)
    if found is None or isinstance(found, Unfinished):
        return found
    raise ConfigError(f"s2t_unfinished is a {type(found).__name__}.", hint="Give the Unfinished of the earlier try.")


def timeout_of(given: Any) -> float | None:
    """A ``timeout`` in seconds; None sets no limit.

    Raises:
        ConfigError: not a number above 0.
    """
    if given is None:
        return None
    try:
        seconds = math.nan if isinstance(given, bool) or not isinstance(given, Real) else float(given)
    except OverflowError:  # an integer beyond any float
        seconds = math.nan
    if not seconds > 0:
        raise ConfigError(
            f"timeout is {given!r:.80}; it must be a number of seconds above 0.",
            hint="Give what a whole answer may take, such as 30; None sets no limit.",
        )
    return seconds


def top_logprobs_of(call: Mapping[str, Any]) -> int | None:
    """How many likeliest tokens one call wants beside each of its own; None if it wants no log-probabilities.

    Raises:
        ConfigError: ``logprobs`` is not a bool (OpenAI's completions have a number there), or ``top_logprobs`` without
            it.
    """
    wanted, top = call.get("logprobs"), call.get("top_logprobs")
    if wanted is not None and not isinstance(wanted, bool):
        raise ConfigError(
            f"logprobs is {wanted!r:.80}; it must be True or False.",
            hint="For alternatives say logprobs=True, top_logprobs=5.",
        )
    if wanted:
        return 0 if top is None else top
    if top:
        raise ConfigError(f"top_logprobs={top!r:.80} needs logprobs=True.", hint="Give both, or neither.")
    return None


def template_args_of(call: Mapping[str, Any]) -> dict[str, Any]:
    """Chat template variables of one call.

    Raises:
        ConfigError: not a mapping with string keys.
    """
    given = call.get("template_args")
    if given is None:
        return {}
    if isinstance(given, Mapping) and all(isinstance(name, str) for name in given):
        return dict(given)
    raise ConfigError(f"template_args is {given!r:.200}.", hint='Give a dict, such as {"enable_thinking": False}.')


def _call_or_configurable(call: Mapping[str, Any], key: str, default: Any) -> Any:
    return next((value for value in (call.get(key), configurable(key)) if value is not None), default)
