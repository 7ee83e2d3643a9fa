"""What LangChain's caches and tracers see of a chat model, through LangChain's own interfaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.caches import RETURN_VAL_TYPE, BaseCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, Generation


class _AlwaysHit(BaseCache):
    """Has an answer for everything, so that no model runs, and remembers the keys."""

    def __init__(self) -> None:
        self.keys: list[str] = []

    def lookup(self, prompt: str, llm_string: str) -> RETURN_VAL_TYPE | None:
        self.keys.append(llm_string)
        return [ChatGeneration(message=AIMessage("cached"))]

    def update(self, prompt: str, llm_string: str, return_val: Sequence[Generation]) -> None:
        raise AssertionError("nothing is generated")

    def clear(self, **kwargs: Any) -> None:
        self.keys.clear()


class _Tracer(BaseCallbackHandler):
    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def on_chat_model_start(self, serialized: Any, messages: Any, *, metadata: Any = None, **kwargs: Any) -> None:
        params = {name: value for name, value in (metadata or {}).items() if name.startswith("ls_")}
        self.seen = {"serialized": serialized, "invocation": kwargs["invocation_params"], "params": params}


def cache_key(model: BaseChatModel, /, **call: Any) -> str:
    """The key under which a cache holds this model's answer to a call; no model runs."""
    cache = _AlwaysHit()
    model.model_copy(update={"cache": cache}).invoke("hello", **call)
    return cache.keys[0]


def traced(model: BaseChatModel, **call: Any) -> dict[str, Any]:
    """What a tracer is given at the start of a call, but for the user's own metadata; no model runs."""
    tracer = _Tracer()
    model.model_copy(update={"cache": _AlwaysHit()}).invoke("hello", {"callbacks": [tracer]}, **call)
    return tracer.seen
