"""LangChain messages to chat template turns: roles, texts, calls with ids of our own, results."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from ..errors import InputError
from ..tokenization.traced_text import check_text
from . import content_blocks
from .hermes_tools import Turn

_ROLES = (
    (SystemMessage, "system"),
    (HumanMessage, "user"),
    (AIMessage, "assistant"),
    (ToolMessage, "tool"),
    (FunctionMessage, "tool"),
)
_ROLE_ALIASES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "ai": "assistant",
}
_Calls = dict[str, list[tuple[str, str]]]
"""LangChain's id of a tool call (some providers reuse ids) to our ids and tool names of the calls without a result."""


def to_template(messages: Sequence[BaseMessage]) -> list[Turn]:
    """Turns as Hugging Face chat templates read them: role, content (always text), tool_calls, tool_call_id, name.

    Call ids are renumbered in order (``call00001``: nine letters and digits, which some templates require), so that a
    prompt does not change with random ids. Arguments that are not JSON are kept under ``invalid_arguments``.

    Raises:
        InputError: no messages; a message or content block that cannot be rendered; a tool result without a
            matching call; text that is not Unicode.
    """
    if not messages:
        raise InputError("There are no messages.", hint="Pass at least one HumanMessage.")
    calls: _Calls = {}
    numbers = itertools.count(1)
    turns: list[Turn] = []
    for where, message in labelled(messages):
        text = content_blocks.text_of(message, where)
        if isinstance(message, AIMessage):
            text = _without_nul(text)
        turn: Turn = {"role": _role_of(message, where), "content": check_text(text, where)}
        if isinstance(message, AIMessage):
            turn |= _calls_and_reasoning(message, calls, numbers)
        elif isinstance(message, ToolMessage):
            turn |= _tool_call_fields(message, calls, where)
        elif isinstance(message, FunctionMessage):
            turn |= _function_call_fields(message, turns, where)
        turns.append(turn)
    return turns


def labelled(messages: Sequence[BaseMessage]) -> list[tuple[str, BaseMessage]]:
    """One message for each turn, and what an error calls it: results among a user's blocks have turns of their own."""
    return [
        (f"Message {at} ({type(message).__name__})", each)
        for at, message in enumerate(messages)
        for each in content_blocks.with_messages_of_tools(message)
    ]


def _role_of(message: BaseMessage, where: str) -> str:
    role = next((role for kind, role in _ROLES if isinstance(message, kind)), None)
    if isinstance(message, ChatMessage):
        role = _ROLE_ALIASES.get(message.role.lower())
    if role is None:
        raise InputError(f"{where} cannot be rendered.", hint="Use System-, Human-, AI- and ToolMessages.")
    return role


def _calls_and_reasoning(message: AIMessage, calls: _Calls, numbers: Iterator[int]) -> Turn:
    """Tool calls and reasoning of an assistant turn; records the calls in ``calls`` under their original ids."""
    entered: _Calls = {}
    tool_calls = []
    for call_id, name, args in content_blocks.calls_of(message):
        own = f"call{next(numbers):05d}"
        entered.setdefault(own if call_id is None else call_id, []).append((own, name))
        function = {"name": name, "arguments": _without_nul(args)}
        tool_calls.append({"type": "function", "id": own, "function": function})
    calls |= entered  # a reused id refers to this turn's call from here on
    thought = _without_nul(content_blocks.reasoning_of(message))
    return ({"tool_calls": tool_calls} if tool_calls else {}) | ({"reasoning_content": thought} if thought else {})


def _without_nul(value: Any) -> Any:
    """What a model wrote, without NUL characters: it may write them, and no prompt can hold them."""
    if isinstance(value, str):
        return value.replace("\0", "")
    if isinstance(value, Mapping):
        return {_without_nul(key): _without_nul(item) for key, item in value.items()}
    return [_without_nul(item) for item in value] if isinstance(value, list | tuple) else value


def _tool_call_fields(message: ToolMessage, calls: _Calls, where: str) -> Turn:
    """Id and tool name of a result; calls that share an id are matched in order."""
    if message.tool_call_id not in calls:
        known = ", ".join(map(repr, calls)) or "none at all"
        raise InputError(
            f"{where} answers tool call {message.tool_call_id!r}, which no earlier AIMessage made (calls: {known}).",
            hint="Keep the AIMessage with that call in the history.",
        )
    same = calls[message.tool_call_id]
    own, name = same.pop(0) if len(same) > 1 else same[0]
    return {"tool_call_id": own, "name": message.name or name}


def _function_call_fields(message: FunctionMessage, turns: Sequence[Turn], where: str) -> Turn:
    """Id and name of a legacy function result: it answers the first open call in the last turn that calls it."""
    for turn in reversed(turns):
        made = [call["id"] for call in turn.get("tool_calls", ()) if call["function"]["name"] == message.name]
        if made:
            answered = {turn.get("tool_call_id") for turn in turns}
            return {
                "tool_call_id": next((own for own in made if own not in answered), made[-1]),
                "name": message.name,
            }
    raise InputError(
        f"{where} answers a call of {message.name!r}, which no earlier AIMessage made.",
        hint="Keep the AIMessage with that call in the history.",
    )
