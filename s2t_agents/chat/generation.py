"""One answer: drains the engine's steps into text and tool calls, and keeps the account.

Engine.run() -> token -> Detokenizer -> ThoughtReader -> StopStrings -> parser -> Delta
                  └──-> Account               └──-> thought ────────────────────────┘
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any

from ..engine.stop_strings import StopStrings
from ..formats.reasoning import Pieces, ThoughtReader
from ..formats.tool_calls import Delta, PlainText, ToolCallParser
from ..ledger import Ledger
from ..scheduling.admission import Place
from ..tokenization.detokenizer import Detokenizer
from ..types import Step
from .accounting import Account
from .request import Checks


class Generation:
    """Iterate ``deltas`` once; then the attributes describe the whole answer.

    Closing the iterator early stops the model within a step, and the ledger still bills what was done.

    Args:
        steps: the engine's generator.
        account: adds up the steps.
        parser: reads the text, and the calls where they are legal.
        tokenizer: the SLM's.
        eos_ids: tokens that end an answer.
        checks: what the finished answer is held to.
        room: tokens that the answer may have; an answer that used them all was cut off.
        thoughts: tells the thought from the answer; None where the model knows no thoughts.
        stop: stop strings; they apply to the text, not inside thoughts and tool calls.
        ledger: takes the record at the end, however it ends; if it cannot, the answer stands and is marked.
        watch: called with every step as it comes.

    Attributes:
        finish_reason: "stop", "length", "tool_calls", or "aborted" while it is unfinished.
        invalid: why calls, or the reply, do not fit their schemas.
    """

    def __init__(
        self,
        steps: Generator[Place | Step, None, None],
        account: Account,
        *,
        parser: ToolCallParser | PlainText,
        tokenizer: Any,
        eos_ids: frozenset[int],
        room: int,
        checks: Checks | None = None,
        thoughts: ThoughtReader | None = None,
        stop: Sequence[str] = (),
        ledger: Ledger | None = None,
        watch: Callable[[Step], None] | None = None,
    ) -> None:
        self._steps, self.account, self._tokenizer, self._eos_ids = steps, account, tokenizer, eos_ids
        self._room, self._stop = room, StopStrings(stop)
        self._ledger, self._watch = ledger, watch
        self.parser, self.thoughts, self.checks = parser, thoughts, checks or Checks()
        self.invalid: list[str] = []
        self.finish_reason = "aborted"

    def deltas(self) -> Generator[Place | Delta, None, None]:
        """What each step adds to the message, also when it is nothing: the consumer may leave after any step.

        Its place in the engine's queue comes first, if it has to wait there.
        """
        error: str | None = None
        try:
            with closing(self._steps):
                yield from self._read()
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
            raise
        finally:
            if self._ledger is not None:
                self.account.keep(self._ledger, self.finish_reason, decode=self._spell, error=error)

    def _read(self) -> Generator[Place | Delta, None, None]:
        detokenizer = Detokenizer(self._tokenizer)
        ended = stopped = False
        for step in self._steps:
            if isinstance(step, Place):
                yield step
                continue
            self.account.add(step)
            if self._watch:
                self._watch(step)
            ended = step.token_id in self._eos_ids
            text = "" if ended else detokenizer.push(step.token_id)
            reasoning, said = self._apart(step.token_id, text, detokenizer)
            delta, stopped = self._answer(said)
            delta.reasoning = reasoning
            yield delta
            if ended or stopped:
                break
        reasoning, said = ("", []) if stopped else self._rest(detokenizer.flush())
        delta, stopped_late = self._answer(said)
        delta.reasoning = reasoning
        if not (stopped or stopped_late):
            delta.add(self.parser.push(None, self._stop.flush()))
        for last in (delta, self.parser.finish()):
            if last:
                yield last
        self.invalid = [str(call["error"]) for call in self.parser.invalid_tool_calls]
        if not self.parser.tool_calls and not self.invalid and (wrong := self.checks.of_reply(self.parser.text)):
            self.invalid = [wrong]
        self.finish_reason = self._reason(ended or stopped or stopped_late)

    def _apart(self, token_id: int, text: str, detokenizer: Detokenizer) -> tuple[str, Pieces]:
        """What a step adds to the thought, and the answer's tokens and texts."""
        if self.thoughts is None:
            return "", [(token_id, text)]
        inside = self.thoughts.thinking
        reasoning, said = self.thoughts.push(token_id, text)
        if inside and not self.thoughts.thinking:
            detokenizer.flush()  # half a character at the thought's end belongs to no answer
        self.account.thought_tokens, self.account.thinking = self.thoughts.tokens, self.thoughts.thinking
        return reasoning, said

    def _rest(self, text: str) -> tuple[str, Pieces]:
        return self.thoughts.finish(text) if self.thoughts is not None else ("", [(None, text)])

    def _answer(self, said: Pieces) -> tuple[Delta, bool]:
        """Tokens and texts of the answer through the stop strings and the parser."""
        delta, stopped = Delta(), False
        for token_id, text in said:
            if not stopped:
                more, stopped = self._parse(token_id, text)
                delta.add(more)
        return delta, stopped

    def _parse(self, token_id: int | None, text: str) -> tuple[Delta, bool]:
        """One step's text through the stop strings (outside tool calls) and the parser."""
        if self.parser.in_call:
            return self.parser.push(token_id, text), False
        if token_id is not None and self.parser.is_tag(token_id):  # what was held back stood before the call
            return self.parser.push(token_id, self._stop.flush()), False
        shown, stopped = self._stop.push(text)
        return self.parser.push(token_id, shown), stopped

    def _reason(self, ended: bool) -> str:
        if self.parser.tool_calls:
            return "tool_calls"
        return "stop" if ended or len(self.account.steps) < self._room else "length"

    def _spell(self, token_id: int) -> str:
        return str(self._tokenizer.decode([token_id]))
