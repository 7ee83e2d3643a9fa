"""Tools as plain text, for chat templates that know none: the Hermes convention, in a system and a user turn."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .tool_calls import CLOSE, OPEN

Turn = dict[str, Any]

RESPONSE_END = "</tool_response>"

_RESPONSE_END = re.compile(r"<\s*/(\s*tool_response\b)", re.IGNORECASE)
_CALL = f'{OPEN}\n{{"name": <function name>, "arguments": <object of arguments>}}\n{CLOSE}'


def tools_block(tools: Sequence[Mapping[str, Any]]) -> str:
    """What the system turn says about the tools (OpenAI's form, one JSON line each)."""
    signatures = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "# Tools\n\nYou can call functions to help with the request. Their signatures:\n"
        f"<tools>\n{signatures}\n</tools>\n\n"
        f"To call one, answer with a JSON object between tags, one pair of tags for each call:\n{_CALL}"
    )


def call_text(call: Mapping[str, Any]) -> str:
    """One tool call as the assistant would write it."""
    body = {"name": call["name"], "arguments": call["arguments"]}
    return f"{OPEN}\n{json.dumps(body, ensure_ascii=False)}\n{CLOSE}"


def result_text(content: str) -> str:
    """One tool result, as it stands in a user turn."""
    return f"<tool_response>\n{kept_inside(content)}\n{RESPONSE_END}"


def kept_inside(content: str) -> str:
    """A tool result that cannot close its frame: what came behind it would read as the user's own words."""
    return _RESPONSE_END.sub(r"<\\/\1", content)


def as_text(turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """The same conversation in system, user and assistant turns alone; results in a row share one user turn."""
    told: list[Turn] = []
    in_results = False
    for turn in turns:
        is_result = turn["role"] == "tool"
        if is_result and in_results:
            told[-1]["content"] += "\n" + result_text(turn["content"])
        elif is_result:
            told.append({"role": "user", "content": result_text(turn["content"])})
        else:
            calls = [call_text(call["function"]) for call in turn.get("tool_calls", ())]
            texts = [text for text in (turn["content"], *calls) if text] if calls else [turn["content"]]
            told.append({"role": turn["role"], "content": "\n".join(texts)})
        in_results = is_result
    return with_system(told, tools_block(tools)) if tools else told


def with_system(turns: Sequence[Turn], text: str) -> list[Turn]:
    """The conversation with more said in its system turn, which is made if there is none."""
    if turns and turns[0]["role"] == "system":
        first = {**turns[0], "content": f"{turns[0]['content']}\n\n{text}".strip()}
        return [first, *turns[1:]]
    return [{"role": "system", "content": text}, *turns]
