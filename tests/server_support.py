"""``s2t serve`` on loopback, in a thread of this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra `server`")

from s2t_agents import ChatS2T, LocalLLM
from s2t_agents.server import create_app
from s2t_agents.server.listening import listen, server_of

DEMO: dict[str, Any] = {"model": "s2t-demo", "selector": "s2t-demo", "max_tokens": 48}
QUESTION = "Ann has 37 shells and finds 48 more. How many are there now?"
STOCK_QUESTION = "Look up the stock of lamps. Then 28 are taken. Add 37 to it. What is the result?"
STOCK_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_stock",
        "description": "Look up the stock of an item.",
        "parameters": {"type": "object", "properties": {"item": {"type": "string"}}, "required": ["item"]},
    },
}


def demo_model(**settings: Any) -> ChatS2T:
    """The bundled pair."""
    return ChatS2T(**{**DEMO, "escalation": LocalLLM("s2t-demo-llm"), **settings})


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@contextmanager
def serving_chat(chat_model: ChatS2T, **settings: Any) -> Iterator[str]:
    """The base URL of a server over a chat model, for the length of a block."""
    bound = listen("127.0.0.1", 0)
    server = server_of(create_app(chat_model, **settings))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    try:
        until = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < until
            time.sleep(0.01)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join(30)
        bound.close()
