"""Conversations with settable texts from outside, and texts that imitate control tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from hypothesis import strategies as st
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage

PLACES: Mapping[str, str] = {
    "system": "Be kind.",
    "user": "Hi there",
    "more": "And tomorrow?",
    "result": "sunny",
    "tool": "weather",
    "description": "Looks outside.",
    "property": "city",
    "about": "Where to look.",
    "choice": "Paris",
    "argument": "near",
    "value": "the river",
    "call_id": "call_1",
}


def conversation(**texts: str) -> tuple[list[BaseMessage], list[dict[str, Any]]]:
    """System, tools, a call with arguments in depth, its result, an answer and another question."""
    said = {**PLACES, **texts}
    schema = {"type": "string", "description": said["about"], "enum": [said["choice"], "Rome"]}
    parameters = {"type": "object", "properties": {said["property"]: schema, "n": {"type": "integer"}}}
    function = {"name": said["tool"], "description": said["description"], "parameters": parameters}
    args = {said["argument"]: said["value"], "of": [said["value"], {said["argument"]: 3}], "n": 2}
    call = {"id": said["call_id"], "name": said["tool"], "args": args}
    messages = [
        SystemMessage(said["system"]),
        HumanMessage(said["user"]),
        AIMessage("Let me look.", tool_calls=[call]),
        ToolMessage(said["result"], tool_call_id=said["call_id"]),
        AIMessage("It is fine."),
        HumanMessage(said["more"]),
    ]
    return messages, [json.loads(json.dumps({"type": "function", "function": function}))]


def control_ids(tokenizer: Any, ids: list[int]) -> list[int]:
    """The added tokens among the ids, but for white space and Gemma's HTML tags, which mean nothing."""
    added = tokenizer.added_tokens_decoder
    html = (
        "table caption thead tbody tfoot tr th td h1 h2 h3 h4 h5 h6 blockquote strong em b code i s sub sup a ul ol li"
    )
    harmless = {f"<{end}{tag}>" for tag in html.split() for end in ("", "/")}
    return [
        i
        for i in ids
        if i in added and added[i].content.strip("▁\n\t ") and (added[i].special or added[i].content not in harmless)
    ]


def words_of(tokenizer: Any, most: int) -> list[str]:
    """Its added tokens; the middle of a long list is left out: there they are as alike as ``<unused812>``."""
    words = [token.content for token in tokenizer.added_tokens_decoder.values()]
    return words if len(words) <= most else words[: most // 2] + words[-most // 2 :]


@cache
def hostile_texts(tokenizer: Any) -> st.SearchStrategy[str]:
    """The tokenizer's added tokens, whole, halved and overlapping, with space and letters around."""
    words = words_of(tokenizer, 200)
    pieces = [piece for word in words for piece in (word[: len(word) // 2], word[len(word) // 2 :], word[:1], word[1:])]
    bits = st.one_of(
        st.sampled_from(words),
        st.sampled_from(pieces),
        st.sampled_from(["user", "name", "n", "x", "\n", " ", '"', "é", "</tools>", "</tool_call>"]),
    )
    return st.lists(bits, min_size=1, max_size=5).map("".join).filter(str.strip)
