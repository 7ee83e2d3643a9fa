"""A served model's likeliest tokens at every position of whole texts, with their log-probabilities.

text ──one prefill──> prompt_logprobs                  where the server lists them (vLLM)
     ──a question a position──> logprob_token_ids      else: the candidates and the likeliest; the server's prefix
                                                       cache holds what was read before

Many texts are read at once; a server that declines is asked again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt

from ..endpoints import event_loop
from ..endpoints.completions import (
    TOP_LOGPROBS,
    LogProb,
    OneTokenLogprobs,
    PartialModel,
    Usage,
    checked,
    logprobs_by_id,
)
from ..endpoints.endpoint import Endpoint
from ..endpoints.retries import retry_wait
from ..endpoints.spending import Spending
from ..errors import EndpointBusy, EndpointRefused, EscalationFailed, QuestionRefused
from ..llms.completions import request_body

logger = logging.getLogger(__name__)

PARALLEL = 8
"""Requests at a time; the server batches them."""
ATTEMPTS = 5
TIMEOUT_S = 600.0
"""Of one request: it may wait for its turn behind many."""
ALL_S = 7 * 86_400.0
MOST_BYTES = 64 << 20
"""Of one answer: 20 tokens with their text at every position."""

Listed = dict[int, float]
"""Log-probabilities of the tokens that a server lists at a position, by id."""
Wanted = Mapping[int, Sequence[int]]
"""Positions that are asked for (so many tokens are before them), and the candidates there; there may be none."""


class _PromptLogProb(PartialModel):
    logprob: LogProb


class _ReadChoice(PartialModel):
    logprobs: OneTokenLogprobs
    prompt_logprobs: tuple[dict[int, _PromptLogProb] | None, ...] | None = None


class _Read(PartialModel):
    choices: tuple[_ReadChoice, ...] = Field(min_length=1, max_length=1)
    usage: Usage | None = None


@dataclass
class ServedReader:
    """Reads with a served model.

    Attributes:
        endpoint: of the server.
        model: the server's name of it.
        vocab_size: no token id reaches it.
        spending: pays for every request; None counts nothing.
        prefills: whether the server lists log-probabilities of prompts; found out by the first answer.
        by_id: whether it supports ``logprob_token_ids``; likewise.
    """

    endpoint: Endpoint
    model: str
    vocab_size: int
    spending: Spending | None = None
    prefills: bool = field(default=True, init=False)
    by_id: bool = field(default=True, init=False)

    def read(self, texts: Sequence[Sequence[int]], wanted: Sequence[Wanted]) -> list[dict[int, Listed]]:
        """What is listed at the wanted positions of each text of token ids.

        Raises:
            EscalationFailed: no usable answer after ``ATTEMPTS`` attempts.
            BudgetExceeded, UnpricedModel, StoreUnavailable: ``spending`` has no room for the next request.
        """
        return event_loop.run_coroutine(self._read_all(texts, wanted), ALL_S)

    async def _read_all(self, texts: Sequence[Sequence[int]], wanted: Sequence[Wanted]) -> list[dict[int, Listed]]:
        room = asyncio.Semaphore(PARALLEL)
        tasks = [
            asyncio.create_task(self._read(text, places, room)) for text, places in zip(texts, wanted, strict=True)
        ]
        try:
            return list(await asyncio.gather(*tasks))
        finally:  # one failed, or the caller left: nothing more is asked
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, text: Sequence[int], wanted: Wanted, room: asyncio.Semaphore) -> dict[int, Listed]:
        if not wanted:
            return {}
        if self.prefills:
            async with room:
                found = await self._prefill(text[: max(wanted)], wanted)
            if found is not None:
                return found
            if self.prefills:
                logger.warning("%s lists no prompt_logprobs: a question is asked a token.", self.endpoint.url.host)
                self.prefills = False

        async def one(at: int, candidates: Sequence[int]) -> Listed:
            async with room:
                return await self._ask(text[:at], candidates)

        asked = [one(at, candidates) for at, candidates in wanted.items()]
        return dict(zip(wanted, await asyncio.gather(*asked), strict=True))

    async def _prefill(self, prompt: Sequence[int], wanted: Wanted) -> dict[int, Listed] | None:
        """Listed at the wanted positions, the last of which follows the prompt; None: not by this server."""
        body = {**self._body(prompt, ()), "prompt_logprobs": TOP_LOGPROBS}
        try:
            answer = await self._post(body)
        except QuestionRefused:  # it has no such field; else the first question will be refused, too
            return None
        rows = answer.choices[0].prompt_logprobs
        if rows is None:
            return None
        if len(rows) != len(prompt):
            raise EscalationFailed(f"{self._host} listed {len(rows)} positions, not {len(prompt)}.")
        found = {}
        for at in wanted:
            if at == len(prompt):
                found[at] = self._checked(logprobs_by_id(answer.choices[0].logprobs.top_logprobs[0]))
            else:
                found[at] = self._checked({token: each.logprob for token, each in (rows[at] or {}).items()})
        return found

    async def _ask(self, prompt: Sequence[int], candidates: Sequence[int]) -> Listed:
        try:
            answer = await self._post(self._body(prompt, candidates))
        except EndpointRefused as refusal:
            if not (self.by_id and candidates and "logprob_token_ids" in str(refusal)):
                raise
            self.by_id = False  # the server refuses unknown fields
            answer = await self._post(self._body(prompt, candidates))
        return self._checked(logprobs_by_id(answer.choices[0].logprobs.top_logprobs[0]))

    def _body(self, prompt: Sequence[int], candidates: Sequence[int]) -> dict[str, Any]:
        return request_body(self.model, [prompt], candidates, by_id=self.by_id and bool(candidates))

    def _checked(self, listed: Listed) -> Listed:
        if not listed:
            raise EscalationFailed(f"{self._host} listed no tokens at a position.")
        return checked(listed, vocab_size=self.vocab_size)

    @property
    def _host(self) -> str:
        return self.endpoint.url.host

    async def _post(self, body: dict[str, Any]) -> _Read:
        retrying = AsyncRetrying(
            retry=retry_if_exception(_may_work_later),
            stop=stop_after_attempt(ATTEMPTS),
            wait=retry_wait,
            reraise=True,
        )
        return await retrying(self._request, body)

    async def _request(self, body: dict[str, Any]) -> _Read:
        """One request, paid for: what it cost by the server's count; all that was held where it broke off."""
        prompt = len(body["prompt"])
        payment = None if self.spending is None else await self.spending.holding(prompt, 1)
        sent: list[bool] = []
        usage = Usage(prompt_tokens=prompt)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                content = await self.endpoint.post(
                    "completions", body, sent=lambda: sent.append(True), most_bytes=MOST_BYTES
                )
            fault = f"{self._host} gave no usable log-probabilities"
            answer = await asyncio.to_thread(_Read.read, content, fault, hint="Is it a vLLM server with this model?")
            usage = answer.usage or usage
            return answer
        except TimeoutError:
            raise EscalationFailed(f"{self._host} gave no answer within {TIMEOUT_S:.3g} s.") from None
        except (EndpointBusy, EndpointRefused):
            sent.clear()
            raise
        finally:
            if payment is not None:
                counts = {"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens}
                await payment.closing({**counts, **usage.cache_counts} if sent else None)


def _may_work_later(error: BaseException) -> bool:
    return isinstance(error, EscalationFailed) and not isinstance(error, EndpointRefused)
