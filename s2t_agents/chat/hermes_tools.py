"""Tools, calls and results as text in system and user turns (Hermes format), for chat templates without tools."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..formats.tool_calls import CLOSE, OPEN
from ..tokenization.chat_template import json_text
from ..tokenization.traced_text import concat, tainted

Turn = dict[str, Any]

TAGS = ("tools", "tool_call", "tool_response")
"""Tags around signatures, calls and results."""

_CALL = f'{OPEN}\n{{"name": <function name>, "arguments": <object of arguments>}}\n{CLOSE}'


class HermesTags:
    """Renders tools as text, and escapes closing tags in text from outside.

    Text after a closing tag would be read as another role's. Only tags that are ordinary text to the tokenizer need
    escaping: where a tag is a control token, text from outside is never encoded as one.

    Args:
        tags: those of ``TAGS`` that are not control tokens.
        cut_at: tags after which the template cuts off an assistant's text; tool calls are in that text.
    """

    def __init__(self, tags: Sequence[str], cut_at: Sequence[str] = ()) -> None:
        self._closing_pattern = _closing_pattern(tags)
        self._closing_json = _closing_pattern([*tags, *cut_at])

    def escape_text(self, text: str, of: Callable[[str], bool] = bool) -> str:
        r"""The text with ``<\/tag`` for each ``</tag`` that ``of`` chooses, which is the same string in JSON."""
        return _escape_closing_tags(text, self._closing_pattern, of)

    def escape_json(self, value: Any) -> str:
        """A value as JSON with closing tags escaped."""
        text = json_text(value)
        return tainted(_escape_closing_tags(text, self._closing_json), text)

    def tools_block(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """The system turn's description of the tools (OpenAI's form, one line of JSON each)."""
        lines = concat(line for tool in tools for line in (self.escape_json(tool), "\n"))
        return concat(
            [
                "# Tools\n\nYou can call functions to help with the request. Their signatures:\n<tools>\n",
                lines,
                "</tools>\n\nTo call one, answer with a JSON object between tags, one pair of tags for each call:\n",
                _CALL,
            ]
        )

    def call_text(self, call: Mapping[str, Any]) -> str:
        """One tool call as the model generates it."""
        body = self.escape_json({"name": call["name"], "arguments": call["arguments"]})
        return concat([OPEN, "\n", body, "\n", CLOSE])

    def result_text(self, content: str) -> str:
        """One tool result as it is put into a user turn."""
        return concat(["<tool_response>\n", self.escape_text(content), "\n</tool_response>"])

    def to_text_turns(self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]) -> list[Turn]:
        """The conversation in system, user and assistant turns only; consecutive results share one user turn."""
        result: list[Turn] = []
        in_results = False
        for turn in turns:
            is_result = turn["role"] == "tool"
            if is_result and in_results:
                result[-1]["content"] = concat([result[-1]["content"], "\n", self.result_text(turn["content"])])
            elif is_result:
                result.append({"role": "user", "content": self.result_text(turn["content"])})
            else:
                calls = [self.call_text(call["function"]) for call in turn.get("tool_calls", ())]
                rest = {key: value for key, value in turn.items() if key != "tool_calls"}
                result.append({**rest, "content": join_nonempty([turn["content"], *calls], "\n")})
            in_results = is_result
        return append_to_system(result, self.tools_block(tools)) if tools else result


def _closing_pattern(tags: Sequence[str]) -> re.Pattern[str]:
    return re.compile(rf"(<\s*)/\s*(?:{'|'.join(tags)})\b" if tags else r"(?!)", re.IGNORECASE)


def _escape_closing_tags(text: str, closing: re.Pattern[str], of: Callable[[str], bool] = bool) -> str:
    """The text with a backslash inserted into each closing tag that is chosen."""
    parts, last = [], 0
    for match in closing.finditer(text):
        if of(text[match.start() : match.end()]):
            parts += [text[last : match.end(1)], "\\"]
            last = match.end(1)
    return concat([*parts, text[last:]]) if parts else text


def join_nonempty(texts: Sequence[str], apart: str = "\n\n") -> str:
    """The texts joined, without empty ones."""
    result: list[str] = []
    for text in filter(None, texts):
        result += [apart, text] if result else [text]
    return concat(result)


def append_to_system(turns: Sequence[Turn], text: str) -> list[Turn]:
    """The conversation with a text appended to its system turn, which is added if there is none."""
    if turns and turns[0]["role"] == "system":
        return [{**turns[0], "content": join_nonempty([turns[0]["content"], text])}, *turns[1:]]
    return [{"role": "system", "content": text}, *turns]
