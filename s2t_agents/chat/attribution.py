"""The agent, thread and run behind a model call, for every way in which LangChain calls a model.

``_stream`` gets no run manager under ``.stream``, ``.astream`` or ``stream_mode="messages"``. A callback handler with
``run_inline`` sees every start, so it keeps the call's metadata in a ContextVar.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler, BaseCallbackManager, Callbacks
from langchain_core.messages import BaseMessage
from langchain_core.runnables import ensure_config

DEFAULT_AGENT = "default"

_metadata: ContextVar[Mapping[str, Any]] = ContextVar("s2t_caller_metadata", default=MappingProxyType({}))


@dataclass(frozen=True)
class Caller:
    """The agent that a call is charged to, and its thread and run id where they are known."""

    agent: str = DEFAULT_AGENT
    thread_id: str | None = None
    run_id: str | None = None


class CallerHandler(BaseCallbackHandler):
    """Stores the metadata of the call that starts in this context."""

    run_inline = True

    def on_chat_model_start(
        self,
        serialized: dict[str, Any],
        messages: list[list[BaseMessage]],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Called by LangChain before the model runs, in the same context."""
        _metadata.set({**(metadata or {}), "run_id": str(parent_run_id or run_id)})


def with_caller_handler(callbacks: Callbacks) -> Callbacks:
    """A model's callbacks with a ``CallerHandler`` added."""
    if isinstance(callbacks, BaseCallbackManager):
        manager = callbacks.copy()
        if not any(isinstance(handler, CallerHandler) for handler in manager.handlers):
            manager.add_handler(CallerHandler(), inherit=False)
        return manager
    handlers = callbacks or []
    return [*handlers, *([] if any(isinstance(handler, CallerHandler) for handler in handlers) else [CallerHandler()])]


def configurable(key: str) -> Any:
    """A value from the ``configurable`` of the enclosing node's config; None when absent."""
    return ensure_config().get("configurable", {}).get(key)


def current_caller(agent: str | None = None, thread: str | None = None) -> Caller:
    """The caller of this context; ``agent`` and ``thread`` override what config and metadata say."""
    metadata = _metadata.get()
    named = agent or configurable("s2t_agent") or agent_of(metadata)
    thread = metadata.get("thread_id", configurable("thread_id")) if thread is None else thread
    return Caller(str(named), None if thread is None else str(thread), metadata.get("run_id"))


def agent_of(metadata: Mapping[str, Any]) -> str:
    """The agent's name in LangGraph's metadata.

    ``s2t_agent`` comes first, then ``lc_agent_name``, which ``create_agent(name=...)`` sets. An unnamed agent inside
    another agent's tools inherits that name, so the node path from there is appended ("boss/tools"). Without a name it
    is the path of the enclosing nodes, without those that ``create_agent`` makes ("model").
    """
    if metadata.get("s2t_agent"):
        return str(metadata["s2t_agent"])
    namespace = str(metadata.get("langgraph_checkpoint_ns") or metadata.get("checkpoint_ns") or "")
    path = [part.split(":")[0] for part in namespace.split("|") if part]
    if name := metadata.get("lc_agent_name"):
        inside = path[path.index("tools") : -1] if "tools" in path else []
        return "/".join([str(name), *inside])
    if len(path) > 1 and _of_an_agent(path[-1]):
        path.pop()
    return "/".join(path) or str(metadata.get("langgraph_node") or DEFAULT_AGENT)


def _of_an_agent(node: str) -> bool:
    """Whether ``create_agent`` made this node."""
    return node in ("model", "tools") or node.endswith(
        (".before_agent", ".before_model", ".after_model", ".after_agent")
    )
