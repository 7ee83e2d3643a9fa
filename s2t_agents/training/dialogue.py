"""Whole answers in bulk: the small loop of turns around one generation, for many items at once.

A turn that calls tools gets what the task's tools return and goes on; a turn that does not is the answer, and so are
calls to which nothing comes back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from langchain_core.messages import convert_to_messages

from ..chat.messages import PromptEncoder
from ..errors import ContextOverflow
from ..formats.tool_calls import ToolCallParser
from ..grammar.grammar import CompiledGrammar, Grammar, cached_vocabulary, tool_grammar
from ..scheduling.language_model import LanguageModel
from ..tokenization.detokenizer import Detokenizer
from .batch_prefix import BatchPrefix
from .lockstep import Decider, Trace, generate
from .tasks import Item, Message, Task
from .tasks.items import calls_text

GRAMMARS_KEPT = 256
"""Compiled grammars per speaker: the rows of a table answer the same items one after the other."""

MAX_TURNS = 3
"""Completions per item: two may call tools, the last must answer."""


@dataclass(frozen=True)
class Reply:
    """One completion, read: its text and the calls it makes, as (name, arguments)."""

    text: str
    calls: tuple[tuple[str, dict[str, Any]], ...] = ()


@dataclass
class AnsweredItem:
    """One item answered: the prompts and completions of its turns, and the text of the last."""

    item: Item
    prompts: list[list[int]] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)
    text: str = ""

    @property
    def tokens(self) -> int:
        """Generated, over all turns."""
        return sum(len(trace.ids) for trace in self.traces)

    def take(
        self, prompt: list[int], trace: Trace, reply: Reply, task: Task, messages: Sequence[Message]
    ) -> tuple[Message, ...] | None:
        """One more turn is done; returns the messages of the next one, None where there is none."""
        self.prompts.append(prompt)
        self.traces.append(trace)
        following = next_turn(task, self.item, messages, reply)
        self.text = calls_text(reply.calls) if reply.calls and following is None else reply.text
        return following if len(self.traces) < MAX_TURNS else None


class Speaker:
    """A model with its chat template: messages to ids, ids to replies."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self._encoder = PromptEncoder(model.tokenizer)
        self._compiled: dict[str, CompiledGrammar] = {}

    def encode(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[int]:
        """Ids up to where the assistant speaks, as ``ChatS2T`` makes them.

        Raises:
            ContextOverflow: no room for a single token of an answer.
        """
        limit = self.model.context_window - 1
        return self._encoder.encode(convert_to_messages(list(messages)), list(tools), limit=limit)

    def grammar(self, item: Item, prompt: Sequence[int], max_tokens: int) -> Grammar | None:
        """What may answer this item's ``prompt``, about to begin; None where anything may.

        Raises:
            BadSchema, ConfigError: as ``ChatS2T`` for the same tools.
        """
        if item.calls is None:
            return None
        key = json.dumps([item.tools, item.calls.several])
        if key not in self._compiled:
            words = cached_vocabulary(self.model.tokenizer, self.model.vocab_size, sorted(self.model.eos_ids))
            if len(self._compiled) >= GRAMMARS_KEPT:
                self._compiled.pop(next(iter(self._compiled)))
            self._compiled[key] = tool_grammar(words, item.tools, "any", parallel=item.calls.several)
        return self._compiled[key].start(min(max_tokens, self.model.context_window - len(prompt)))

    def read(self, ids: Sequence[int]) -> Reply:
        """Text and tool calls of a completion, its end token included or not."""
        detokenizer = Detokenizer(self.model.tokenizer)
        parser = ToolCallParser.for_tokenizer(self.model.tokenizer)
        for token in ids:
            if token not in self.model.eos_ids:
                parser.push(token, detokenizer.push(token))
        parser.push(None, detokenizer.flush())
        parser.finish()
        return Reply(parser.text, tuple((call["name"], call["args"]) for call in parser.tool_calls))


def next_turn(task: Task, item: Item, messages: Sequence[Message], reply: Reply) -> tuple[Message, ...] | None:
    """The messages of the next turn: the calls made and what the tools return; None when the reply was the answer.

    Calls are the answer where a tool returns nothing.
    """
    if not reply.calls:
        return None
    calls, results = [], []
    for at, (name, arguments) in enumerate(reply.calls, 1):
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        calls.append({"id": f"call_{at}", "type": "function", "function": function})
        returned = task.call(item, name, arguments)
        if returned is None:
            return None
        results.append({"role": "tool", "tool_call_id": f"call_{at}", "name": name, "content": returned})
    return (*messages, {"role": "assistant", "content": reply.text, "tool_calls": calls}, *results)


Start = Callable[[list[list[int]]], BatchPrefix]
"""Reads prompts; memoised where several rows of a table share them."""

MakeDecider = Callable[[list[list[int]], list[int]], Decider]
"""A decider for one turn, from its prompts and the places of their items."""


def converse(
    speaker: Speaker, task: Task, items: Sequence[Item], make: MakeDecider, max_tokens: int, start: Start | None = None
) -> list[AnsweredItem]:
    """Answer all items at once, turn by turn.

    Args:
        speaker: the model that generates.
        task: runs the tools.
        items: one row each.
        make: called once per turn.
        max_tokens: per turn.
        start: reads prompts; by default plainly.

    Raises:
        ContextOverflow: a first prompt that does not fit. (A later one that does not fit ends its answer.)
    """
    read = start or (lambda prompts: BatchPrefix(speaker.model, prompts))
    answers = [AnsweredItem(item) for item in items]
    going = {at: tuple(item.messages) for at, item in enumerate(items)}
    prompts = {at: speaker.encode(messages, items[at].tools) for at, messages in going.items()}
    for _ in range(MAX_TURNS):
        rows = list(going)
        if not rows:
            break
        wanted = [prompts[at] for at in rows]
        grammars = [speaker.grammar(items[at], prompts[at], max_tokens) for at in rows]
        ruled = grammars if any(each is not None for each in grammars) else None
        traces = generate(read(wanted), make(wanted, rows), max_tokens, ruled)
        upcoming: dict[int, tuple[Message, ...]] = {}
        for at, prompt, trace in zip(rows, wanted, traces, strict=True):
            following = answers[at].take(prompt, trace, speaker.read(trace.ids), task, going[at])
            if following is not None:
                upcoming[at] = following
        going, prompts = _fitting(speaker, items, upcoming)
    return answers


def _fitting(
    speaker: Speaker, items: Sequence[Item], going: dict[int, tuple[Message, ...]]
) -> tuple[dict[int, tuple[Message, ...]], dict[int, list[int]]]:
    """The turns whose prompts fit the context window, and their ids."""
    prompts: dict[int, list[int]] = {}
    for at, messages in going.items():
        try:
            prompts[at] = speaker.encode(messages, items[at].tools)
        except ContextOverflow:
            continue
    return {at: going[at] for at in prompts}, prompts
