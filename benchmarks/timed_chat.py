"""``ChatS2T`` with the time of every token: prompts of a wanted length, and a tool whose calls are long.

The tool takes an array of integers. A call of it is as long as wanted whatever the weights are, is text that reads back
as the same tokens, and nearly every token of it is chosen by the model among few legal ones.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage

from s2t_agents import ChatS2T, LanguageModel, Step

FRAME = '<tool_call>\n{"name": "save_numbers", "arguments": {"numbers": []}}\n</tool_call>'
"""What a call has beside its numbers; the grammar chooses nearly all of that."""

WORDS = "Count 12 and 7, then add 30. "


def tool(least: int) -> dict[str, Any]:
    """A tool whose calls list at least so many integers."""
    numbers = {"type": "array", "items": {"type": "integer"}, "minItems": least}
    parameters = {"type": "object", "properties": {"numbers": numbers}, "required": ["numbers"]}
    return {
        "type": "function",
        "function": {"name": "save_numbers", "description": "Save some numbers.", "parameters": parameters},
    }


def text_of(length: int, count: Callable[[str], int]) -> str:
    """A text of so many tokens, or a few more.

    Args:
        length: tokens; none gives an empty text.
        count: of a text's tokens.
    """
    text, unit = "", max(1, count(WORDS))
    while (missing := length - count(text)) > 0:
        text += WORDS * (missing // unit) if missing >= unit else WORDS[: max(1, len(WORDS) * missing // unit)]
    return text


@dataclass(frozen=True)
class TimedAnswer:
    """One answer.

    Attributes:
        message: the answer.
        ids: of its tokens.
        stamps: when each of them came.
        chosen: the same of those that the model chose; the grammar forced the others.
    """

    message: AIMessage
    ids: list[int]
    stamps: list[float]
    chosen: list[float]


class TimedChat:
    """``ChatS2T`` over a loaded model, the time of every token kept.

    Args:
        model: see ``shapes.measured_model``.
        tokens: that the model chooses for an answer, about.
    """

    def __init__(self, model: LanguageModel, tokens: int) -> None:
        self._steps: defaultdict[str, list[tuple[float, Step]]] = defaultdict(list)
        self.chat = ChatS2T(model=model, max_tokens=tokens, on_step=self._keep)
        self.least = max(1, tokens // 3)  # of at most three tokens each, with what is between them
        self._tokens, self._frame = tokens, len(self.chat.get_token_ids(FRAME))

    def _keep(self, trace_id: str, step: Step) -> None:
        self._steps[trace_id].append((time.perf_counter(), step))

    def answer(
        self, messages: Sequence[BaseMessage], *, scope: str, tools: str | None = None, stream: bool = False
    ) -> TimedAnswer:
        """One answer.

        Args:
            messages: the conversation.
            scope: whose KV may be found again.
            tools: with the tool bound, the tool choice; None binds nothing.
            stream: by ``stream`` instead of ``invoke``.
        """
        bound = self.chat if tools is None else self.chat.bind_tools([tool(self.least)], tool_choice=tools)
        room = self._tokens + (self._frame if tools == "any" else 0)
        call: dict[str, Any] = {"s2t_cache_scope": scope, "max_tokens": room}
        if stream:
            chunks = list(bound.stream(list(messages), **call))
            trace_id = next(found for chunk in chunks if (found := _trace_id(chunk)))
            answer: AIMessage = chunks[-1]
        else:
            answer = bound.invoke(list(messages), **call)
            trace_id = str(_trace_id(answer))
        steps = self._steps.pop(trace_id)
        return TimedAnswer(
            answer,
            ids=[step.token_id for _, step in steps],
            stamps=[at for at, _ in steps],
            chosen=[at for at, step in steps if step.picked_by != "grammar"],
        )

    def conversation(self, system: int, question: int) -> list[BaseMessage]:
        """A system message and a question of so many tokens each."""
        return [SystemMessage(self.text(system)), HumanMessage(self.text(question))]

    def text(self, tokens: int) -> str:
        """A text of so many tokens."""
        return text_of(tokens, lambda text: len(self.chat.get_token_ids(text)))


def _trace_id(message: AIMessage) -> str | None:
    found: str | None = message.response_metadata.get("s2t", {}).get("trace_id")
    return found
