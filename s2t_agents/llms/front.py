"""The LLM that ``escalation=`` names: weights on this machine, a server, or a chat model as judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from langchain_core.language_models import BaseChatModel

from ..backends.completions.backend import SCHEME, server_url, split_address
from ..errors import ConfigError
from .base import LLMSelector
from .judge import ChatJudge
from .local_llm import LocalLLM
from .openai_llm import OpenAILLM


def llm_of(given: Any) -> LLMSelector:
    """An LLM from its name.

    Args:
        given: a directory, hub id or GGUF file (``LocalLLM``); ``vllm://host:port/name`` or the base URL of a
            completions server with the model's name behind a ``#`` (``OpenAILLM``); a LangChain chat model
            (``ChatJudge``); an LLM.

    Raises:
        ConfigError: something else; a URL without the model's name.
    """
    if isinstance(given, BaseChatModel):
        return ChatJudge(given)
    if isinstance(given, str | Path):
        name = str(given)
        return _served(name) if "://" in name else LocalLLM(name)
    if hasattr(given, "open") and hasattr(given, "check"):
        llm: LLMSelector = given
        return llm
    raise ConfigError(
        f"escalation is a {type(given).__name__}.",
        hint="Give a path, a hub id, a server's URL, a chat model, an LLM (LocalLLM, ...) or an Escalation.",
    )


def _served(address: str) -> OpenAILLM:
    if address.startswith(SCHEME):
        host, model = split_address(address)
        return OpenAILLM(server_url(host, allow_http=False), model)
    url, _, model = address.partition("#")
    if not model:
        raise ConfigError(
            "escalation is a URL that does not say which model.",
            hint='Put the model\'s name behind a "#": "https://host/v1#name"; or take OpenAILLM(url, name, ...).',
        )
    return OpenAILLM(url, model)
