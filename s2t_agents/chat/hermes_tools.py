"""Tools as plain text, for chat templates that know none: the Hermes convention, in a system and a user turn."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..formats.tool_calls import CLOSE, OPEN
from ..tokenization.chat_template import json_text
from ..tokenization.traced_text import blurred, concat

Turn = dict[str, Any]

TAGS = ("tools", "tool_call", "tool_response")
"""What frames signatures, calls and results."""

_CALL = f'{OPEN}\n{{"name": <function name>, "arguments": <object of arguments>}}\n{CLOSE}'


class Frames:
    """The tags that are ordinary letters to a tokenizer: text inside a frame must not close it.

    What comes behind a closing tag would read as another's words. Where a tag is a control token, no text is one.

    Args:
        letters: those of ``TAGS`` that are no control tokens.
        cut_at: tags at whose end the template cuts an assistant's text: calls stand there.
    """

    def __init__(self, letters: Sequence[str], cut_at: Sequence[str] = ()) -> None:
        self._closing = _closing(letters)
        self._closing_json = _closing([*letters, *cut_at])

    def kept_inside(self, text: str) -> str:
        r"""The text with ``<\/tag`` for ``</tag``, which is the same string in JSON."""
        return _broken(text, self._closing)

    def json_kept_inside(self, value: Any) -> str:
        """A value as JSON that closes no frame."""
        text = json_text(value)
        return blurred(_broken(text, self._closing_json), text)

    def tools_block(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """What the system turn says about the tools (OpenAI's form, one JSON line each)."""
        lines = concat(line for tool in tools for line in (self.json_kept_inside(tool), "\n"))
        return concat(
            [
                "# Tools\n\nYou can call functions to help with the request. Their signatures:\n<tools>\n",
                lines,
                "</tools>\n\nTo call one, answer with a JSON object between tags, one pair of tags for each call:\n",
                _CALL,
            ]
        )

    def call_text(self, call: Mapping[str, Any]) -> str:
        """One tool call as the assistant would write it."""
        body = self.json_kept_inside({"name": call["name"], "arguments": call["arguments"]})
        return concat([OPEN, "\n", body, "\n", CLOSE])

    def result_text(self, content: str) -> str:
        """One tool result, as it stands in a user turn."""
        return concat(["<tool_response>\n", self.kept_inside(content), "\n</tool_response>"])

    def as_text(self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]) -> list[Turn]:
        """The same conversation in system, user and assistant turns alone; results in a row share one user turn."""
        told: list[Turn] = []
        in_results = False
        for turn in turns:
            is_result = turn["role"] == "tool"
            if is_result and in_results:
                told[-1]["content"] = concat([told[-1]["content"], "\n", self.result_text(turn["content"])])
            elif is_result:
                told.append({"role": "user", "content": self.result_text(turn["content"])})
            else:
                calls = [self.call_text(call["function"]) for call in turn.get("tool_calls", ())]
                rest = {key: value for key, value in turn.items() if key != "tool_calls"}
                told.append({**rest, "content": joined([turn["content"], *calls], "\n")})
            in_results = is_result
        return with_system(told, self.tools_block(tools)) if tools else told


def _closing(tags: Sequence[str]) -> re.Pattern[str]:
    return re.compile(rf"<\s*(?=/\s*(?:{'|'.join(tags)})\b)" if tags else r"(?!)", re.IGNORECASE)


def _broken(text: str, closing: re.Pattern[str]) -> str:
    """The text with a backslash in each closing tag."""
    parts, last = [], 0
    for match in closing.finditer(text):
        parts += [text[last : match.end()], "\\"]
        last = match.end()
    return concat([*parts, text[last:]]) if parts else text


def joined(texts: Sequence[str], apart: str = "\n\n") -> str:
    """The texts in one, those that are empty left out."""
    told: list[str] = []
    for text in filter(None, texts):
        told += [apart, text] if told else [text]
    return concat(told)


def with_system(turns: Sequence[Turn], text: str) -> list[Turn]:
    """The conversation with more said in its system turn, which is made if there is none."""
    if turns and turns[0]["role"] == "system":
        return [{**turns[0], "content": joined([turns[0]["content"], text])}, *turns[1:]]
    return [{"role": "system", "content": text}, *turns]
