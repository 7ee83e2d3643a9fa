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

from ..budget import Budget
from ..chat.asked_conversation import AskedConversation
from ..chat.messages import PromptEncoder
from ..chat.recent import Recent
from ..chat.response_options import ResponseOptions
from ..engine.engine import Engine, steps_of
from ..errors import ContextOverflow, InputError
from ..formats.tool_calls import ToolCallParser
from ..grammar.grammar import CompiledGrammar, Grammar
from ..grammar.vocabulary import cached_vocabulary
from ..scheduling.language_model import LanguageModel
from ..scheduling.waits import Waiting
from ..tokenization.detokenizer import Detokenizer
from ..types import Sampling, Step
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
class Trace:
    """One completion: its tokens, where it was triggered, flipped or decided by the LLM (positions in ``ids``).

    ``llm_tokens`` is what the LLM read and wrote for it.
    """

    ids: list[int] = field(default_factory=list)
    triggered: list[int] = field(default_factory=list)
    flipped: list[int] = field(default_factory=list)
    by_llm: list[int] = field(default_factory=list)
    llm_tokens: int = 0

    @classmethod
    def of(cls, steps: Sequence[Step]) -> Trace:
        """Of a generation's steps."""
        charges = [step.escalation.actual for step in steps if step.escalation is not None]
        return cls(
            [step.token_id for step in steps],
            [step.index for step in steps if step.triggered],
            [step.index for step in steps if step.flipped],
            [step.index for step in steps if step.picked_by == "llm"],
            sum(charge.llm_tokens for charge in charges if charge is not None),
        )


@dataclass
class AnsweredItem:
    """One item answered: prompts and completions of its turns, what the prompts are of, and the last one's text."""

    item: Item
    prompts: list[list[int]] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)
    text: str = ""
    conversations: list[AskedConversation] = field(default_factory=list)

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
    """A model with its chat template: messages to ids, ids to replies.

    Args:
        model: loaded.
        template: source of a chat template; None takes its tokenizer's.
    """

    def __init__(self, model: LanguageModel, template: str | None = None) -> None:
        self.model = model
        self._encoder = PromptEncoder(model.tokenizer, chat_template=template)
        self._grammars = Recent[str, CompiledGrammar](GRAMMARS_KEPT)

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
        words = cached_vocabulary(self.model.tokenizer, self.model.vocab_size, sorted(self.model.eos_ids))
        options = ResponseOptions(item.tools, "any", parallel=item.calls.several)
        key = json.dumps([item.tools, item.calls.several])
        compiled = self._grammars.get(key, lambda: options.compile(words))
        return compiled.start(min(max_tokens, self.model.context_window - len(prompt)))

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


def check_prompts(speaker: Speaker, items: Sequence[Item]) -> None:
    """Refuse prompts that this model cannot read, before any is answered.

    Raises:
        InputError: how many, and what the first one's fault is.
    """
    faults: list[tuple[Item, InputError]] = []
    for item in items:
        try:
            speaker.encode(item.messages, item.tools)
        except InputError as error:
            faults.append((item, error))
    if faults:
        first, fault = faults[0]
        where = f" of {first.where}" if first.where else ""
        raise InputError(
            f"{len(faults)} of {len(items)} prompts cannot be used, id {first.id!r}{where} first: {fault}"
        ) from fault


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


def answering(
    speaker: Speaker,
    task: Task,
    item: Item,
    engine: Engine,
    sampling: Callable[[Sequence[int]], Sampling],
    escalations: int | None = None,
) -> Waiting[AnsweredItem]:
    """Answer one item, turn by turn, exactly as the package serves it; run many ``gather``.

    Args:
        speaker: the model that generates.
        task: runs the tools.
        item: what is asked.
        engine: how.
        sampling: of a turn, from its prompt.
        escalations: for all turns; None sets no limit.

    Raises:
        ContextOverflow: a first prompt that does not fit. (A later one that does not fit ends its answer.)
    """
    answer, messages = AnsweredItem(item), tuple(item.messages)
    budget = Budget(escalations=escalations) if escalations is not None else None
    prompt = speaker.encode(messages, item.tools)
    while True:
        settings = sampling(prompt)
        grammar = speaker.grammar(item, prompt, settings.max_tokens)
        conversation = AskedConversation(convert_to_messages(list(messages)), list(item.tools), len(prompt))
        answer.conversations.append(conversation)
        steps = yield from steps_of(
            engine.generation(prompt, settings, grammar=grammar, budget=budget, conversation=conversation)
        )
        trace = Trace.of(steps)
        following = answer.take(prompt, trace, speaker.read(trace.ids), task, messages)
        if following is None:
            break
        messages = following
        try:
            prompt = speaker.encode(messages, item.tools)
        except ContextOverflow:
            break
    return answer
