"""Time per token through ``ChatS2T``, grammar on, beside the bare engine and transformers' ``generate`` at one prompt.

    generate, engine            the conversation without tools, as token ids
    chat, chat streamed         the same through ``ChatS2T``: every answer has a grammar
    engine, tool prompt         the conversation with a tool bound, as token ids
    chat, tool bound            text where a call would be legal
    chat, tool called           a forced call: the grammar is in a JSON array all the time

Rows take turns, and ratios are taken within each turn. In a forced call only tokens count that the model chose.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any
from uuid import uuid4

from s2t_agents import Engine, LanguageModel
from s2t_agents.chat.messages import PromptEncoder
from s2t_agents.types import Sampling

from .decode import Generate, Timed
from .timed_chat import TimedChat, tool

CHAT = {"chat": "engine", "chat, streamed": "engine", "chat, tool bound": "engine, tool prompt"}
CHAT["chat, tool called"] = "engine, tool prompt"
"""Rows of ``ChatS2T``, and the row of the bare engine at the same prompt."""

HELD = ("chat", "chat, tool bound", "chat, tool called")
"""Rows that a target is set for."""

SYSTEM = 24

Run = Callable[[str], list[float]]
"""One answer of a row within a cache scope: when each token came."""


def run(model: LanguageModel, *, prefix: int, tokens: int = 101, repeats: int = 5) -> dict[str, Any]:
    """All rows on one model.

    Args:
        model: see ``shapes.measured_model``.
        prefix: tokens of the question; the template and the tool's definition come on top.
        tokens: of each answer.
        repeats: of each row; prompts are read in the first (cold), their KV is at hand in the others (warm).

    Returns:
        ``{"prompt_tokens", "rows": {name: {"ms_per_token", "over_engine", "over_generate", "first_token_cold_ms",
        "first_token_warm_ms"}}, ...}``; ratios are medians of those within each repeat.
    """
    timed_chat, encoder = TimedChat(model, tokens), PromptEncoder(model.tokenizer)
    messages = timed_chat.conversation(SYSTEM, prefix)
    plain = encoder.encode(messages, ())
    with_tool = encoder.encode(messages, (tool(timed_chat.least),))
    engine, theirs = Engine(model), Generate(model, [plain])

    def bare(prompt: list[int]) -> Run:
        def stepped(scope: str) -> list[float]:
            steps = engine.steps(prompt, Sampling(max_tokens=tokens), cache_scope=scope)
            return [time.perf_counter() for _ in steps]

        return stepped

    def through_chat(**options: Any) -> Run:
        return lambda scope: timed_chat.answer(messages, scope=scope, **options).chosen

    rows: dict[str, Run] = {
        "generate": lambda scope: theirs(tokens),
        "engine": bare(plain),
        "chat": through_chat(),
        "chat, streamed": through_chat(stream=True),
        "engine, tool prompt": bare(with_tool),
        "chat, tool bound": through_chat(tools="auto"),
        "chat, tool called": through_chat(tools="any"),
    }
    for choice in (None, "auto", "any"):  # grammars are compiled once in the life of a process
        timed_chat.answer(messages, scope=uuid4().hex, tools=choice)
    timed = {name: Timed() for name in rows}
    scopes = {name: uuid4().hex for name in rows}
    for _ in range(repeats):
        for name, work in rows.items():
            started = time.perf_counter()
            timed[name].add(started, work(scopes[name]))
    return {
        "model": model.name,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "vocabulary": len(model.tokenizer),
        "prompt_tokens": {"plain": len(plain), "with_tool": len(with_tool)},
        "tokens": tokens,
        "repeats": repeats,
        "rows": {name: _row(name, timed) for name in rows},
    }


def _row(name: str, timed: dict[str, Timed]) -> dict[str, Any]:
    own = timed[name]
    return {
        "ms_per_token": statistics.median(own.token_ms),
        "over_engine": own.over(timed[CHAT.get(name, "engine")]),
        "over_generate": own.over(timed["generate"]),
        "first_token_cold_ms": own.first_ms[0],
        "first_token_warm_ms": statistics.median(own.first_ms[1:]) if own.first_ms[1:] else None,
    }


def slowest(part: dict[str, Any]) -> float:
    """What the product's path takes over the bare engine, at most."""
    return max(float(part["rows"][name]["over_engine"]) for name in HELD)
