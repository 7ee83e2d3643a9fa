"""One generation: drains the engine's steps into text and tool calls, and accounts for them.

Engine.run() -> token -> Detokenizer -> ReasoningParser -> StopStrings -> parser -> MessageDelta
                  └──-> Account               └──-> reasoning ───────────────────────┘
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, TypeVar

from ..engine.stop_strings import StopStrings
from ..formats.reasoning import ReasoningParser, TextPieces
from ..formats.tool_calls import MessageDelta, PlainTextParser, ToolCallParser
from ..grammar.grammar import Grammar
from ..ledger import Ledger
from ..scheduling.admission import AdmissionTicket
from ..telemetry import AnswerRequest, begin
from ..tokenization.detokenizer import Detokenizer, token_bytes
from ..types import Step
from .accounting import Account
from .response_options import OutputSchemas
from .telemetry_messages import output_message

T = TypeVar("T")


@dataclass(frozen=True)
class GenerationRequest:
    """The input of one generation.

    Attributes:
        prompt: token ids.
        grammar: state of the grammar that masks the logits; it says whether ``room`` shortened the answer.
            None masks nothing.
        room: maximum number of completion tokens; an answer that used them all finishes with "length", unless it is
            JSON of its schema, which is whole then.
        parser: streaming parser of text and tool calls.
        eos_ids: tokens that end an answer.
        schemas: validate the finished answer.
        thoughts: splits reasoning from the answer; None for a model without a reasoning format.
        stop: stop strings; they apply to the text, not inside reasoning and tool calls.
        with_special: whether special tokens have a text; only for an answer that is plain text.
    """

    prompt: Sequence[int]
    grammar: Grammar | None
    room: int
    parser: ToolCallParser | PlainTextParser
    eos_ids: frozenset[int]
    schemas: OutputSchemas = field(default_factory=OutputSchemas)
    thoughts: ReasoningParser | None = None
    stop: Sequence[str] = ()
    with_special: bool = False


class Generation:
    """One answer. Iterate ``deltas`` or ``run`` once; afterwards the attributes describe the whole answer.

    Closing the iterator early stops the model within a step; the ledger still records the work done.

    Args:
        steps: the engine's generator.
        account: accumulates the steps.
        request: what is generated.
        tokenizer: the SLM's.
        ledger: receives the record at the end, however the generation ends; a failure to record does not fail the
            answer, which is marked with ``ledger_error``.
        on_step: called with every step.
        asked: what the answer was asked for with, for its telemetry; None has none.

    Attributes:
        finish_reason: "stop", "length", "tool_calls", or "aborted" while unfinished.
        invalid: why tool calls, or the JSON reply, do not fit their schemas.
    """

    def __init__(
        self,
        steps: Generator[AdmissionTicket | Step, None, None],
        account: Account,
        request: GenerationRequest,
        tokenizer: Any,
        *,
        ledger: Ledger | None = None,
        on_step: Callable[[Step], None] | None = None,
        asked: AnswerRequest | None = None,
    ) -> None:
        self._steps, self.account, self._tokenizer = steps, account, tokenizer
        self._room, self._grammar, self._stop = request.room, request.grammar, StopStrings(request.stop)
        self._detokenizer = Detokenizer(tokenizer, with_special=request.with_special)
        self._ledger, self._on_step, self._asked = ledger, on_step, asked
        self.parser, self.thoughts, self.schemas = request.parser, request.thoughts, request.schemas
        self.eos_ids = request.eos_ids
        self.invalid: list[str] = []
        self.finish_reason = "aborted"
        self._ended = self._stopped = False

    def deltas(self) -> Generator[AdmissionTicket | MessageDelta, None, None]:
        """One delta per step, empty ones included, so that the consumer can stop after any step.

        An ``AdmissionTicket`` comes first while the generation waits in the engine's queue.
        """
        yield from self._recorded(self._read_each())

    def run(self) -> Generator[AdmissionTicket | None, None, None]:
        """The whole answer, for the attributes alone: None after each step.

        Texts are read at the end, which takes less than between forwards; step by step if one may end the answer.
        """
        if self._stop:
            for each in self.deltas():
                yield each if isinstance(each, AdmissionTicket) else None
        else:
            yield from self._recorded(self._read_together())

    def _recorded(self, items: Generator[T, None, None]) -> Generator[T, None, None]:
        """These items, and at their end, or where they fail, the ledger's record and telemetry."""
        error: Exception | None = None
        telemetry = self.account.telemetry = begin(self._asked) if self._asked is not None else None
        try:
            with closing(self._steps), closing(items):
                yield from items
        except Exception as problem:
            error = problem
            raise
        finally:
            error_text = None if error is None else f"{type(error).__name__}: {error}"
            record = cache(partial(self.account.record, self.finish_reason, decode=self.decode, error=error_text))
            if self._ledger is not None:
                self.account.write_record(self._ledger, record, decode=self.decode, prompt_text=self._prompt_text)
            if telemetry is not None:
                telemetry.end(
                    record,
                    reused_tokens=self.account.reused_tokens,
                    budget=self.account.budget.path if self.account.budget is not None else None,
                    error=error,
                    output=self.as_messages,
                )

    def _read_each(self) -> Generator[AdmissionTicket | MessageDelta, None, None]:
        for each in self._counted():
            yield each if isinstance(each, AdmissionTicket) else self._read(each)
            if self._ended:
                break
        yield from self._read_rest()

    def _read_together(self) -> Generator[AdmissionTicket | None, None, None]:
        try:
            for each in self._counted():
                yield each if isinstance(each, AdmissionTicket) else None
        finally:
            for step in self.account.steps:
                self._read(step)
        for _ in self._read_rest():
            pass

    def _counted(self) -> Generator[AdmissionTicket | Step, None, None]:
        for each in self._steps:
            if isinstance(each, Step):
                self.account.add(each)
                if self._on_step:
                    self._on_step(each)
            yield each

    def _read(self, step: Step) -> MessageDelta:
        """What a step adds to the message."""
        ended = step.token_id in self.eos_ids
        text = "" if ended else self._detokenizer.push(step.token_id)
        reasoning, pieces = self._split_reasoning(step.token_id, text)
        delta, stopped = self._parse_pieces(pieces)
        delta.reasoning = reasoning
        self._ended, self._stopped = ended or stopped, stopped
        return delta

    def _read_rest(self) -> Generator[MessageDelta, None, None]:
        """What was held back until now; the answer is judged after it."""
        reasoning, pieces = ("", []) if self._stopped else self._split_rest(self._detokenizer.flush())
        delta, stopped_late = self._parse_pieces(pieces)
        delta.reasoning = reasoning
        if not (self._stopped or stopped_late):
            delta.add(self.parser.push(None, self._stop.flush()))
        for last in (delta, self.parser.finish()):
            if last:
                yield last
        self.invalid = list(self.parser.errors)
        if not self.parser.tool_calls and not self.invalid and (wrong := self.schemas.reply_error(self.parser.text)):
            self.invalid = [wrong]
        self.finish_reason = self._finish_reason(self._ended or stopped_late)
        self.account.shortened = self._grammar is not None and self._grammar.shortened

    def _split_reasoning(self, token_id: int, text: str) -> tuple[str, TextPieces]:
        """The reasoning text that a step adds, and the tokens and texts that belong to the answer."""
        if self.thoughts is None:
            return "", [(token_id, text)]
        inside = self.thoughts.thinking
        reasoning, pieces = self.thoughts.push(token_id, text)
        if inside and not self.thoughts.thinking:
            self._detokenizer.flush()  # an incomplete character at the end of the reasoning is not part of the answer
        self.account.thought_tokens, self.account.thinking = self.thoughts.tokens, self.thoughts.thinking
        return reasoning, pieces

    def _split_rest(self, text: str) -> tuple[str, TextPieces]:
        return self.thoughts.finish(text) if self.thoughts is not None else ("", [(None, text)])

    def _parse_pieces(self, pieces: TextPieces) -> tuple[MessageDelta, bool]:
        """Pass tokens and texts of the answer through stop strings and parser; also whether a stop string matched."""
        delta, stopped = MessageDelta(), False
        for token_id, text in pieces:
            if not stopped:
                more, stopped = self._parse(token_id, text)
                delta.add(more)
        return delta, stopped

    def _parse(self, token_id: int | None, text: str) -> tuple[MessageDelta, bool]:
        """Pass one step's text through stop strings (outside tool calls) and parser."""
        if self.parser.in_call:
            return self.parser.push(token_id, text), False
        if token_id is not None and self.parser.is_tag(token_id):  # text held back precedes the call
            return self.parser.push(token_id, self._stop.flush()), False
        shown, stopped = self._stop.push(text)
        return self.parser.push(token_id, shown), stopped

    def _finish_reason(self, ended: bool) -> str:
        if self.parser.tool_calls:
            return "tool_calls"
        cut = self.account.work.stopped_by is not None or len(self.account.steps) >= self._room
        whole = ended or (self.schemas.reply is not None and not self.invalid)
        return "length" if cut and not whole else "stop"

    def as_messages(self) -> list[dict[str, Any]]:
        """The answer, whole or as far as it came, as ``gen_ai.output.messages``."""
        reasoning = self.thoughts.reasoning if self.thoughts is not None else ""
        return [output_message(self.parser.text, reasoning, self.parser.tool_calls, self.finish_reason)]

    def _prompt_text(self) -> str:
        return str(self._tokenizer.decode(self.account.prompt))

    def decode(self, token_id: int) -> str:
        """One token as text."""
        return str(self._tokenizer.decode([token_id]))

    def token_bytes(self, token_id: int) -> bytes:
        """One token's bytes, which need not be whole characters."""
        return token_bytes(self._tokenizer, token_id)
