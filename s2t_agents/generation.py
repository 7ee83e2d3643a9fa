"""One answer: drains the engine's steps into text and tool calls, and keeps the account.

Engine.run() -> token -> Detokenizer -> StopStrings -> parser -> Delta
                  └──-> Account
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any

from .accounting import Account
from .engine.admission import Place
from .engine.stop import StopStrings
from .ledger import Ledger
from .models.detokenizer import Detokenizer
from .request import Checks
from .tool_calls import Delta, PlainText, ToolCallParser
from .types import Step


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
        stop: stop strings; they apply to the text, not inside tool calls.
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
        stop: Sequence[str] = (),
        ledger: Ledger | None = None,
        watch: Callable[[Step], None] | None = None,
    ) -> None:
        self._steps, self.account, self._tokenizer, self._eos_ids = steps, account, tokenizer, eos_ids
        self._room, self._stop = room, StopStrings(stop)
        self._ledger, self._watch = ledger, watch
        self.parser, self.checks = parser, checks or Checks()
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
            delta, stopped = self._parse(step.token_id, text)
            yield delta
            if ended or stopped:
                break
        rest = self.parser.push(None, "" if stopped else detokenizer.flush() + self._stop.flush())
        for delta in (rest, self.parser.finish()):
            if delta:
                yield delta
        self.invalid = [str(call["error"]) for call in self.parser.invalid_tool_calls]
        if not self.parser.tool_calls and not self.invalid and (wrong := self.checks.of_reply(self.parser.text)):
            self.invalid = [wrong]
        self.finish_reason = self._reason(ended or stopped)

    def _parse(self, token_id: int, text: str) -> tuple[Delta, bool]:
        """One step's text through the stop strings (outside tool calls) and the parser."""
        if self.parser.in_call:
            return self.parser.push(token_id, text), False
        if self.parser.is_tag(token_id):  # what was held back stood before the call
            return self.parser.push(token_id, self._stop.flush()), False
        shown, stopped = self._stop.push(text)
        return self.parser.push(token_id, shown), stopped

    def _reason(self, ended: bool) -> str:
        if self.parser.tool_calls:
            return "tool_calls"
        return "stop" if ended or len(self.account.steps) < self._room else "length"

    def _spell(self, token_id: int) -> str:
        return str(self._tokenizer.decode([token_id]))
