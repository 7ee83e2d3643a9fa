"""Answers of an existing log: OpenAI-style requests and answers, or exported LangSmith runs, one JSON object a line.

OpenAI-style::

    {"request": {"model": ..., "messages": [...], "tools": [...]}, "response": {"choices": [...], "usage": {...}}}
    {"body": {...}, "response": {"status_code": 200, "body": {...}}}          batches
    {"messages": [..., {"role": "assistant", ...}]}                           conversations that end with an answer

LangSmith: runs as ``Client.list_runs`` gives them; those of models alone (``run_type`` "llm") are answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

from langchain_core.messages import AIMessage, BaseMessage, convert_to_messages

from ..budget import TokenPrice, known_price, money
from ..budget.charges import cache_counts
from ..budget.prices import LIST_TIERS
from ..errors import BadLimit
from ..redaction import one_line

MAX_LINE = 8 << 20
"""Bytes of a line; a longer one is stepped over."""
MAX_TOKENS = 10**8
"""Tokens that a usage may state."""
_CHUNK = 1 << 20


class NotAnAnswer(Exception):
    """A line of a log that holds no answer to read; the message says why in a few words. No caller sees it."""


@dataclass(frozen=True)
class LoggedAnswer:
    """One answer of a log.

    Attributes:
        messages: the conversation before it.
        answer: the message.
        tools: in OpenAI's form.
        model: that gave it, as the log names it; None if it does not.
        input_tokens, output_tokens: as the log states them; None if it does not.
        cache_counts: what of the input the provider's cache had and what was written to it, as of ``charge_for``.
        usd: what it cost, as the log states it; None if it does not.
        tier: "batch", or the service tier, if it has another price than the list's; None at list price.
    """

    messages: list[BaseMessage]
    answer: AIMessage
    tools: list[dict[str, Any]]
    model: str | None = None
    input_tokens: int | None = None
    cache_counts: dict[str, int] = field(default_factory=dict)
    output_tokens: int | None = None
    usd: Decimal | None = None
    tier: str | None = None

    def cost(self, price: TokenPrice | None) -> Decimal | None:
        """USD as logged, or by a list price; None where neither is known, or the list's does not hold."""
        if self.usd is not None or self.tier is not None:
            return self.usd
        if price is None or self.input_tokens is None or self.output_tokens is None:
            return None
        return price.cost(input_tokens=self.input_tokens, output_tokens=self.output_tokens, **self.cache_counts)


@dataclass(frozen=True)
class Line:
    """One line of a file: its number from 1, where it begins, and its bytes (None: longer than ``MAX_LINE``)."""

    number: int
    offset: int
    text: bytes | None


def lines_of(path: Path) -> Iterator[Line]:
    """The lines of a file that are not blank, in bounded memory."""
    with path.open("rb") as file:
        number = 0
        while True:
            number, offset = number + 1, file.tell()
            text = file.readline(MAX_LINE + 1)
            if not text:
                return
            if len(text) > MAX_LINE and not text.endswith(b"\n"):
                _skip_line(file)
                yield Line(number, offset, None)
            elif text.strip():
                yield Line(number, offset, text)


def line_at(path: Path, offset: int) -> bytes:
    """The line that begins there."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.readline(MAX_LINE + 1)


def _skip_line(file: BinaryIO) -> None:
    while (text := file.readline(_CHUNK)) and not text.endswith(b"\n"):
        pass


def read_answer(text: bytes | None) -> LoggedAnswer:
    """The answer of a line.

    Raises:
        NotAnAnswer: there is none, or it cannot be read.
    """
    if text is None:
        raise NotAnAnswer(f"longer than {MAX_LINE >> 20} MB")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise NotAnAnswer("no JSON") from None
    if not isinstance(found, dict):
        raise NotAnAnswer("no JSON object")
    try:
        return _langsmith(found) if "run_type" in found else _openai(found)
    except NotAnAnswer:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, NotImplementedError, RecursionError):
        raise NotAnAnswer("messages that cannot be read") from None


# ------------------------------------------------------------------ OpenAI's form


def _openai(line: dict[str, Any]) -> LoggedAnswer:
    request = _body(next((line[key] for key in ("request", "body", "input") if isinstance(line.get(key), dict)), line))
    messages, response = request.get("messages"), line.get("response", line.get("output"))
    if not isinstance(messages, list) or not messages:
        raise NotAnAnswer("no messages")
    if response is None:
        *messages, last = messages
        if _mapping(last).get("role") != "assistant":
            raise NotAnAnswer("no answer")
        return _logged(messages, _mapping(last), request.get("tools"), {}, request.get("model"))
    response = _mapping(response)
    batch = "custom_id" in line or ("body" in line and "status_code" in response)
    if isinstance(status := response.get("status_code"), int) and status >= 400:
        raise NotAnAnswer("a failed request")
    response = _body(response)
    if response.get("object") == "chat.completion.chunk":
        raise NotAnAnswer("a piece of a stream")
    if not response.get("choices"):
        raise NotAnAnswer("no answer")
    message = _mapping(response["choices"][0]["message"])
    model = response.get("model") or request.get("model")
    tiers = ["batch"] if batch else [response.get("service_tier"), request.get("service_tier")]
    usage = _mapping(response.get("usage") or {})
    return _logged(messages, message, request.get("tools"), usage, model, tiers=tiers)


def _body(found: dict[str, Any]) -> dict[str, Any]:
    return found["body"] if isinstance(found.get("body"), dict) else found


def _mapping(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise NotAnAnswer("messages that cannot be read")
    return found


def _logged(
    messages: list[Any],
    answer: dict[str, Any],
    tools: Any,
    usage: dict[str, Any],
    model: Any,
    usd: Any = None,
    tiers: Sequence[Any] = (),
) -> LoggedAnswer:
    said = {"role": "assistant", "content": answer.get("content") or "", "tool_calls": answer.get("tool_calls") or []}
    *before, last = convert_to_messages([*messages, said])
    if not isinstance(last, AIMessage) or last.invalid_tool_calls:
        raise NotAnAnswer("a call that cannot be read")
    if not last.text and not last.tool_calls:
        raise NotAnAnswer("an empty answer")
    details = _mapping(usage.get("prompt_tokens_details") or usage.get("input_token_details") or {})
    read = _tokens(usage.get("prompt_tokens", usage.get("input_tokens")))
    counts = cache_counts(details, read or 0)
    return LoggedAnswer(
        before,
        last,
        [tool for tool in tools or [] if isinstance(tool, dict) and isinstance(tool.get("function"), dict)],
        model if isinstance(model, str) and model else None,
        None if counts is None else read,
        counts or {},
        _tokens(usage.get("completion_tokens", usage.get("output_tokens"))),
        _usd(usd),
        _off_list([*tiers, usage.get("service_tier"), *(name for name in _COUNTED_TIERS if name in details)]),
    )


_COUNTED_TIERS = ("flex", "priority")
"""Service tiers of which LangChain's usage counts the tokens by name."""


def _off_list(stated: Sequence[Any]) -> str | None:
    """The first service tier that is stated; None if there is none, or list prices are its own."""
    tier = next((each for each in stated if isinstance(each, str) and each), None)
    return None if tier in LIST_TIERS else tier


def _tokens(found: Any) -> int | None:
    return found if type(found) is int and 0 <= found <= MAX_TOKENS else None


def _usd(found: Any) -> Decimal | None:
    if found is None:
        return None
    try:
        usd = money.dollars(str(found), "cost")
    except BadLimit:
        return None
    return usd if usd <= money.MAX_USD else None


# ------------------------------------------------------------------ LangSmith's runs


def _langsmith(run: dict[str, Any]) -> LoggedAnswer:
    if run["run_type"] != "llm":
        raise NotAnAnswer("not a model's run")
    if run.get("error"):
        raise NotAnAnswer("a failed request")
    inputs, outputs = _mapping(run.get("inputs") or {}), _mapping(run.get("outputs") or {})
    messages = inputs.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[0], list):
        messages = messages[0]
    if not isinstance(messages, list) or not messages:
        raise NotAnAnswer("no messages")
    extra = _mapping(run.get("extra") or {})
    parameters, metadata = _mapping(extra.get("invocation_params") or {}), _mapping(extra.get("metadata") or {})
    answer, usage, tiers = _langsmith_answer(outputs)
    usage = usage or {name: run.get(name) for name in ("prompt_tokens", "completion_tokens")}
    model = metadata.get("ls_model_name") or parameters.get("model") or parameters.get("model_name")
    usd, tools = run.get("total_cost"), inputs.get("tools") or parameters.get("tools")
    tiers.append(parameters.get("service_tier"))
    return _logged([_plain(_mapping(each)) for each in messages], answer, tools, usage, model, usd, tiers)


def _langsmith_answer(outputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], list[Any]]:
    """The answer, and its usage and service tiers where they are told with it."""
    if outputs.get("generations"):
        found = outputs["generations"][0]
        generation = _mapping(found[0] if isinstance(found, list) else found)
        message = _mapping(generation.get("message") or {"content": generation.get("text")})
        kwargs = _mapping(message.get("kwargs") or message)
        told = kwargs.get("response_metadata")
        told = told if isinstance(told, dict) else {}
        tiers = [each.get("service_tier") for each in (told, told.get("usage")) if isinstance(each, dict)]
        return _plain(message), _mapping(kwargs.get("usage_metadata") or {}), tiers
    if outputs.get("choices"):
        message = _mapping(outputs["choices"][0]["message"])
        return message, _mapping(outputs.get("usage") or {}), [outputs.get("service_tier")]
    raise NotAnAnswer("no answer")


_ROLES = {
    "HumanMessage": "user",
    "SystemMessage": "system",
    "AIMessage": "assistant",
    "AIMessageChunk": "assistant",
    "ToolMessage": "tool",
    "human": "user",
    "ai": "assistant",
}


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message in OpenAI's form; LangChain's serialized ones are read as data, never loaded as objects."""
    if "role" in message:
        return message
    kwargs = _mapping(message.get("kwargs") or message)
    named = message["id"][-1] if isinstance(message.get("id"), list) else kwargs.get("type", "ai")
    if named not in _ROLES:
        raise NotAnAnswer("messages that cannot be read")
    found: dict[str, Any] = {"role": _ROLES[named], "content": kwargs.get("content") or ""}
    calls = [
        {
            "type": "function",
            "id": str(call.get("id") or f"call_{at}"),
            "function": {"name": call["name"], "arguments": json.dumps(call["args"])},
        }
        for at, call in enumerate(kwargs.get("tool_calls") or ())
    ]
    if calls:
        found["tool_calls"] = calls
    if named == "ToolMessage":
        found["tool_call_id"] = str(kwargs.get("tool_call_id", ""))
    return found


def price_of(model: str | None, known: dict[str, TokenPrice | None]) -> TokenPrice | None:
    """The list price of a logged model; remembered in ``known``."""
    if model is None:
        return None
    if model not in known:
        known[model] = known_price(model)
    return known[model]


def shown(name: str) -> str:
    """A name from a log as one line of a terminal."""
    return one_line(name)[:80]
