"""The arguments of one call besides its messages: where they may be said, and what they must be.

LangChain hands a model only the callbacks, tags and metadata of a call's config, so what ``configurable`` says is
carried into the call's own arguments before LangChain takes over.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.runnables import RunnableConfig, ensure_config

from .attribution import configurable

OWN = ("s2t_agent", "s2t_budget", "s2t_cache_scope")
"""Who asks, on which budget and beside whom: no part of the question, so neither traced nor a part of cache keys."""


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


def said(call: Mapping[str, Any], key: str, default: Any) -> Any:
    """One of ``OWN``: the call's own, or the enclosing node's, or the model's."""
    for value in (call.get(key), configurable(key)):
        if value is not None:
            return value
    return default
