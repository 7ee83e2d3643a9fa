"""The greedy continuation of a prompt by the server of a ``vllm://`` model, read ahead in the background; errors that
it states in mid-stream.

request ──> "token_id:17": -0.1, "token_id:4": -2.9, ...     one prediction a position: the best tokens, and which one
                                                             the server went on with
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from ...endpoints import event_loop
from ...endpoints.completions import LogProb, PartialModel, checked, logprobs_by_id, token_id
from ...endpoints.endpoint import Endpoint
from ...endpoints.spending import Payment
from ...endpoints.statuses import status_error
from ...errors import EndpointBusy, EndpointRefused, EscalationFailed
from ...fork_safety import hold_while_forking
from ..deadline import Deadline

DATA = b"data:"
DONE = b"[DONE]"
"""Server-sent events, as OpenAI's API uses them."""

GRACE_S = 1.0
"""Seconds that a server has to end a stream after its last token: then the connection can be used again."""


@dataclass(frozen=True)
class Prediction:
    """One position of a completion.

    Attributes:
        token: the server went on with this one.
        logprobs: of the best tokens, that one among them.
    """

    token: int
    logprobs: dict[int, float]


class _StreamLogprobs(PartialModel):
    tokens: tuple[str, ...]
    top_logprobs: tuple[dict[str, LogProb], ...]


class _StreamChoice(PartialModel):
    logprobs: _StreamLogprobs | None = None
    finish_reason: str | None = None


class _StreamError(PartialModel):
    code: Any = None


class _StreamChunk(PartialModel):
    choices: tuple[_StreamChoice, ...] = Field(default=(), max_length=1)
    error: _StreamError | None = None


def predictions(event: bytes, vocab_size: int) -> tuple[list[Prediction], bool]:
    """The positions that one event holds, none where it holds other things, as token counts; and is it the last one?

    Raises:
        EndpointBusy, EndpointRefused: an error with the code of an HTTP status, as if it had come so.
        EscalationFailed: not JSON, another error, token ids or log-probabilities that cannot be.
    """
    chunk = _StreamChunk.read(event, "the server's stream cannot be used")
    if chunk.error is not None:
        message, code = "the server broke its stream off with an error of its own", chunk.error.code
        if isinstance(code, int) and 400 <= code < 600:
            raise status_error(code, f"{message}, {code}.")
        raise EscalationFailed(f"{message}.")
    found = [each for choice in chunk.choices for each in _positions(choice.logprobs, vocab_size)]
    return found, any(choice.finish_reason is not None for choice in chunk.choices)


def _positions(logprobs: _StreamLogprobs | None, vocab_size: int) -> list[Prediction]:
    if logprobs is None:
        return []
    if len(logprobs.tokens) != len(logprobs.top_logprobs):
        raise EscalationFailed("the server's stream gives other numbers of tokens than of log-probabilities.")
    return [
        _prediction(token_id(token), logprobs_by_id(top), vocab_size)
        for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True)
    ]


def _prediction(token: int, logprobs: dict[int, float], vocab_size: int) -> Prediction:
    if token not in logprobs:
        raise EscalationFailed("the server wrote a token without its log-probability.", hint="Ask it for logprobs.")
    hint = 'Give the tokenizer of the model that it serves: model_kwargs={"tokenizer": ...}.'
    return Prediction(token, checked(logprobs, vocab_size=vocab_size, hint=hint))


class CompletionStream:
    """One streamed request. Its positions arrive in the background and are waited for by one thread.

    Args:
        endpoint: of the server.
        body: of the request.
        start: tokens of its prompt.
        vocab_size: no token id reaches it.
        payment: is settled by ``close``; None where nothing is counted.
    """

    def __init__(
        self, endpoint: Endpoint, body: dict[str, Any], *, start: int, vocab_size: int, payment: Payment | None = None
    ) -> None:
        self.start, self._vocab_size = start, vocab_size
        self._arrived: list[Prediction] = []
        self._followed = 0
        """Of these, how many the sequence has been seen to take."""
        self._error: BaseException | None = None
        self._over = self._written = False
        self._changed = threading.Condition()
        hold_while_forking(self, "_changed")
        self._sent = False
        self._payment = payment
        self._task = asyncio.run_coroutine_threadsafe(self._read(endpoint, body), event_loop.shared_loop())

    def __len__(self) -> int:
        """Positions that have arrived."""
        return len(self._arrived)

    @property
    def over(self) -> bool:
        """Whether it ended or broke off, so that nothing more arrives."""
        return self._over

    def after(self, ids: Sequence[int], seconds: float, deadline: Deadline | None = None) -> Prediction | None:
        """The prediction after the sequence ``ids``, which only grows from call to call, as soon as it is there.

        Args:
            ids: the sequence.
            seconds: without a token after which the stream has failed.
            deadline: of the generation that waits.

        Returns:
            None where this stream does not lead there: the server went on otherwise, or ended the completion before.

        Raises:
            EscalationFailed: the stream broke off before, or no token came for so long.
            S2TError: of the deadline.
        """
        wanted, arrived, until = len(ids) - self.start, -1, 0.0
        while True:
            with self._changed:
                if arrived != len(self._arrived):
                    arrived, until = len(self._arrived), time.monotonic() + seconds
                while self._followed < min(arrived, wanted):
                    if self._arrived[self._followed].token != ids[self.start + self._followed]:
                        return None
                    self._followed += 1
                if arrived > wanted:
                    return self._arrived[wanted]
                if self._error is not None:
                    raise self._error
                if self._over or self._written:
                    return None
                patience = until - time.monotonic()
                if patience <= 0:
                    raise EscalationFailed(f"the server sent no token within {seconds:.3g} s.")
                left_s = patience if deadline is None else max(0.0, deadline.end_s())
                came = self._changed.wait(min(patience, left_s))
            if not came and deadline is not None and deadline.end_s() <= 0:
                deadline.check()  # without the lock: it may ask a store

    def close(self) -> None:
        """Hang up; the server stops writing. What it has written is paid for, in this thread: a store may be slow."""
        self._hang_up()
        payment, self._payment = self._payment, None
        if payment is not None:
            self._settle(payment)

    def abandon(self) -> None:
        """``close`` without blocking, for garbage collection, which may come while this thread holds a store's lock."""
        self._hang_up()
        if self._payment is not None:
            loop = event_loop.shared_loop()
            loop.call_soon_threadsafe(loop.run_in_executor, None, self.close)

    def _hang_up(self) -> None:
        if self._written:  # it ends by itself
            loop = event_loop.shared_loop()
            loop.call_soon_threadsafe(loop.call_later, GRACE_S, self._task.cancel)
        else:
            self._task.cancel()

    async def _read(self, endpoint: Endpoint, body: dict[str, Any]) -> None:
        error: BaseException | None = None
        try:
            async with aclosing(endpoint.lines("completions", body, sent=self._begins)) as lines:
                async for line in lines:
                    if not line.startswith(DATA):
                        continue
                    event = line.removeprefix(DATA).strip()
                    if event == DONE:
                        self._end(None)
                        async with asyncio.timeout(GRACE_S):
                            async for _ in lines:
                                pass
                        break
                    self._add(*predictions(event, self._vocab_size))
        except Exception as problem:  # noqa: BLE001 - handed to the thread that waits
            error = problem
        finally:
            self._end(error)

    def _end(self, error: BaseException | None) -> None:
        """Of the stream; what comes after the first end changes nothing."""
        with self._changed:
            if not self._over:
                self._error, self._over = error, True
                self._changed.notify_all()

    def _begins(self) -> None:
        self._sent = True

    def _settle(self, payment: Payment) -> None:
        """The whole prompt is charged as read anew: a stream that is left does not say what was cached."""
        if self._arrived or (self._sent and not isinstance(self._error, EndpointBusy | EndpointRefused)):
            payment.settle(input_tokens=self.start, output_tokens=len(self._arrived))
        else:
            payment.release()

    def _add(self, found: list[Prediction], last: bool) -> None:
        with self._changed:
            self._arrived += found
            self._written = self._written or last
            self._changed.notify_all()
