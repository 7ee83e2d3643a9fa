"""What users say besides messages, to a model and to a call: where it may be said, and what is refused.

LangChain hands a model only the callbacks, tags and metadata of a call's config, so what ``configurable`` says is
carried into the call's own arguments before LangChain takes over.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.runnables import RunnableConfig, ensure_config
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from ..budget import Budget
from ..errors import ConfigError
from .attribution import configurable
from .unfinished_answers import Unfinished

OWN = ("s2t_agent", "s2t_budget", "s2t_cache_scope", "s2t_unfinished")
"""Who asks, on which budget, beside whom and after which tries: no part of the question, so neither traced nor in
cache keys."""

QUESTION = (
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
    "top_p",
)
"""What changes an answer."""

LANGCHAINS = (
    "ls_structured_output_format",
    "stream",
    "stream_options",
    "stream_usage",
    "strict",
    "structured_output_format",
)
"""What LangChain or its other models' users pass along; each holds here in any case, or is LangChain's to read."""

PER_CALL = {"budget": "s2t_budget", "cache_scope": "s2t_cache_scope"}
"""Settings of the model that a call says under another name."""


class TakesConfig(BaseChatModel):
    """A chat model for which ``configurable={"s2t_budget": ...}`` counts in every way LangChain calls a model."""

    def invoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **call: Any,
    ) -> AIMessage:
        """One answer."""
        return super().invoke(input, config, stop=stop, **carried(config, call))

    async def ainvoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **call: Any,
    ) -> AIMessage:
        """One answer."""
        return await super().ainvoke(input, config, stop=stop, **carried(config, call))

    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **call: Any,
    ) -> Iterator[AIMessageChunk]:
        """One answer, as it comes."""
        return super().stream(input, config, stop=stop, **carried(config, call))

    def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **call: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        """One answer, as it comes."""
        return super().astream(input, config, stop=stop, **carried(config, call))

    if not TYPE_CHECKING:  # LangChain's overloads stay what type checkers see

        def stream_events(self, input: Any, config: Any = None, **call: Any) -> Any:
            """The events of one answer."""
            return super().stream_events(input, config, **carried(config, call))

        def astream_events(self, input: Any, config: Any = None, **call: Any) -> Any:
            """The events of one answer."""
            return super().astream_events(input, config, **carried(config, call))

    def _get_invocation_params(self, stop: list[str] | None = None, **call: Any) -> dict[str, Any]:
        return super()._get_invocation_params(stop=stop, **foreign(call))


def carried(config: RunnableConfig | None, call: Mapping[str, Any]) -> dict[str, Any]:
    """The call's arguments, with those of ``OWN`` that only the config's ``configurable`` gives."""
    found = ensure_config(config).get("configurable", {})
    given = {key: found[key] for key in OWN if found.get(key) is not None and call.get(key) is None}
    return {**call, **given}


def foreign(call: Mapping[str, Any]) -> dict[str, Any]:
    """The call's arguments that are part of the question."""
    return {key: value for key, value in call.items() if key not in OWN}


def without_nones(settings: Mapping[str, Any], fields: Mapping[str, FieldInfo]) -> dict[str, Any]:
    """A model's settings, but for each None where the default is another value: it means the default."""
    return {
        name: value
        for name, value in settings.items()
        if value is not None or name not in fields or fields[name].default is None
    }


def refusal(error: ValidationError, fields: Mapping[str, FieldInfo]) -> ConfigError:
    """What pydantic says of a model's settings, in one line; what may be secret is not repeated."""
    found = error.errors()[0]
    name = ".".join(map(str, found["loc"])) or "a setting"
    if found["type"] == "extra_forbidden":
        near = get_close_matches(name, fields, n=1)
        return ConfigError(f"ChatS2T takes no {name}.", hint=f"Did you mean {near[0]}?" if near else "")
    field = fields.get(str(found["loc"][0])) if found["loc"] else None
    shown = f"{found['input']!r:.200}" if field is not None and field.repr else "no such value"
    return ConfigError(f"{name} is {shown}: {found['msg']}.")


def check_call(call: Collection[str], settings: Collection[str]) -> None:
    """Refuse arguments that would do nothing.

    Args:
        call: names of the call's arguments.
        settings: names of the model's settings.

    Raises:
        ConfigError: naming the argument and what may have been meant.
    """
    known = [*QUESTION, *OWN]
    for name in call:
        if name in known or name in LANGCHAINS:
            continue
        if name in settings:
            way_out = f"Per call, use {PER_CALL[name]}." if name in PER_CALL else f"Say it in ChatS2T({name}=...)."
            raise ConfigError(f"{name} is a setting of the model, not of a call.", hint=way_out)
        near = get_close_matches(name, known, n=1)
        raise ConfigError(
            f"{name} is no argument of a call.",
            hint=f"Did you mean {near[0]}?" if near else f"Calls take {', '.join(known)}.",
        )


def budget_of(call: Mapping[str, Any], default: Budget | None) -> Budget | None:
    """The budget of one call: its own, or the enclosing node's, or the model's.

    Raises:
        ConfigError: something else in its place.
    """
    budget = _said(call, "s2t_budget", default)
    if budget is None or isinstance(budget, Budget):
        return budget
    raise ConfigError(f"s2t_budget is {budget!r}; it must be a Budget.", hint="Say Budget(usd=..., escalations=...).")


def cache_scope_of(call: Mapping[str, Any], default: str | None) -> str | None:
    """The cache scope of one call: its own, or the enclosing node's, or the model's.

    Raises:
        ConfigError: it is no text.
    """
    scope = _said(call, "s2t_cache_scope", default)
    if scope is None or isinstance(scope, str):
        return scope
    raise ConfigError(f"s2t_cache_scope is {scope!r}; it must be a text.", hint="Give each tenant a name.")


def unfinished_of(call: Mapping[str, Any]) -> Unfinished | None:
    """The earlier tries of one call, where they are to be gone on with.

    Raises:
        ConfigError: something else in their place.
    """
    found = _said(call, "s2t_unfinished", None)
    if found is None or isinstance(found, Unfinished):
        return found
    raise ConfigError(f"s2t_unfinished is a {type(found).__name__}.", hint="Give the Unfinished of the earlier try.")


def template_args_of(call: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of the chat template that a call gives beside the model's.

    Raises:
        ConfigError: they are no mapping of names.
    """
    given = call.get("template_args")
    if given is None:
        return {}
    if isinstance(given, Mapping) and all(isinstance(name, str) for name in given):
        return dict(given)
    raise ConfigError(f"template_args is {given!r:.200}.", hint='Give a dict, such as {"enable_thinking": False}.')


def _said(call: Mapping[str, Any], key: str, default: Any) -> Any:
    return next((value for value in (call.get(key), configurable(key)) if value is not None), default)
