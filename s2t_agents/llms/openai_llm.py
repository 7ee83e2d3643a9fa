"""A large model behind an OpenAI-compatible server: token ids in, log-probabilities out, one request a question."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pydantic import SecretStr
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    stop_before_delay,
    wait_random_exponential,
)

from ..backends.torch.language_model import LanguageModel
from ..errors import ConfigError, EndpointBusy, EndpointRefused, EscalationFailed, OutOfTime
from ..types import Charge, Price
from . import completions, event_loop
from .circuit_breaker import CircuitBreaker
from .endpoint import Endpoint
from .hedging import hedged
from .question import Answer, Question, charge
from .request_costs import Owe, Tab, together
from .same_tokenizer import Spelling, verify

JITTER = wait_random_exponential(multiplier=0.1, max=2.0)
"""Seconds between attempts where the server does not say: up to 0.1, 0.2, 0.4, ... at random."""
HEDGED = "asked twice: the first request was late"


class OpenAILLM:
    """A model with the SLM's tokenizer behind ``/v1/completions``, as vLLM serves it.

    The server must take token ids as a prompt and name tokens by id in its log-probabilities
    (``return_tokens_as_token_ids``). Where it knows ``logprob_token_ids`` every candidate is scored; elsewhere its 20
    best tokens are read, and the receipt says how many candidates lay outside. The tokenizer is compared on the
    server's ``/tokenize`` where it has one; elsewhere that it is the SLM's is for you to know.

    No fault of the server takes the answer down: within ``timeout_s``, and within what the budget's deadline leaves,
    there is an answer or the local pick stands. Only a question that cost nothing (429, 5xx) is put again.

    Args:
        base_url: up to and including the version, as ``http://127.0.0.1:8000/v1``. Other machines need https.
        model: as the server calls it.
        api_key: bearer token. It is never shown and does not travel in a pickle.
        api_key_env: environment variable to read it from instead; this does travel.
        price: of its tokens, for dollar budgets; ``known_price(name)`` for a listed model, a ``TokenPrice`` for
            your own server, None when you do not know it. Tokens that the server reports as cached are paid for as
            such (vLLM: ``--enable-prompt-tokens-details``); a server that does not say is billed the whole prefix.
        timeout_s: seconds for one question, retries included.
        attempt_s: seconds for one request.
        connect_s: seconds for one connection.
        attempts: requests per question at most, those of hedging not counted.
        hedge_after_s: seconds without an answer after which a second request like it is sent, the first usable answer
            taken and the other request cancelled. Both may be billed, so twice as much is held for every question.
            None, the default, sends no second request.
        breaker: shared with others who ask the same endpoint; its own by default.
        allow_http: permit plain HTTP to other machines.
        verify: as httpx takes it: True, or an ``ssl.SSLContext``.

    Raises:
        ConfigError: a URL, key or time that cannot work.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: SecretStr | str | None = None,
        api_key_env: str | None = None,
        price: Price | None = None,
        timeout_s: float = 10.0,
        attempt_s: float = 5.0,
        connect_s: float = 2.0,
        attempts: int = 3,
        hedge_after_s: float | None = None,
        breaker: CircuitBreaker | None = None,
        allow_http: bool = False,
        verify: Any = True,
    ) -> None:
        for name, value in {"timeout_s": timeout_s, "attempt_s": attempt_s, "connect_s": connect_s}.items():
            if not 0 < value <= 3600:
                raise ConfigError(f"{name} is {value}; it must lie above 0 and at most at 3600 seconds.")
        if attempts < 1:
            raise ConfigError(f"attempts is {attempts}; at least 1 request is needed for an answer.")
        if hedge_after_s is not None and not 0 < hedge_after_s < min(attempt_s, timeout_s):
            raise ConfigError(
                f"hedge_after_s is {hedge_after_s}; it must lie above 0 and under attempt_s ({attempt_s}) and timeout_s"
                f" ({timeout_s}).",
                hint="Take about the 95th percentile of the server's answers, or None for no second request.",
            )
        self.name, self.price = model, price
        self.endpoint = Endpoint(
            base_url,
            api_key=api_key,
            api_key_env=api_key_env,
            connect_s=connect_s,
            allow_http=allow_http,
            verify=verify,
        )
        self.timeout_s, self.attempt_s, self.connect_s, self.attempts = timeout_s, attempt_s, connect_s, attempts
        self.hedge_after_s = hedge_after_s
        self.breaker = breaker or CircuitBreaker()
        self._by_id = True
        self._unverified: dict[str, Spelling] = {}

    def __repr__(self) -> str:
        return f"OpenAILLM({self.endpoint.shown!r}, {self.name!r})"

    def __getstate__(self) -> dict[str, Any]:
        """Pickles without its key and its breaker's memory."""
        return {**self.__dict__, "breaker": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.breaker = CircuitBreaker()

    def check(self, slm: LanguageModel) -> None:
        """Compare model name and tokenizer with the server's, where it can be reached and offers it.

        A server that is down now is asked for this before its first question.

        Raises:
            ModelNotFound: the server lists its models, and this is none of them.
            TokenizerMismatch: it spells a sample text in other ids.
        """
        spelling = Spelling.of(slm)
        self._unverified[spelling.fingerprint] = spelling
        try:
            with self.breaker.attempt():
                event_loop.run(self._verify(), 2 * self.connect_s)
        except EscalationFailed:
            return

    def open(self) -> OpenAISession:
        """A session; the server keeps the prefix cache."""
        return OpenAISession(self)

    def close(self) -> None:
        """Close idle connections. It can be asked again afterwards."""
        event_loop.run(self.endpoint.close(), self.connect_s)

    def worst(self, question: Question) -> Charge:
        """The most that one request can cost: the whole prefix, as if nothing were cached, and one token."""
        return charge(self.price, input_tokens=len(question.ids))

    def complete(self, question: Question) -> Answer:
        """Put one question to the server.

        Raises:
            EscalationFailed: no usable answer in time.
            TokenizerMismatch, ModelNotFound: as ``check``, where the server could not be reached before.
        """
        seconds = self.timeout_s if question.seconds is None else min(self.timeout_s, question.seconds)
        if seconds <= 0:
            raise OutOfTime("the deadline has passed.")
        late = OutOfTime if seconds < min(self.timeout_s, self.attempt_s) else EscalationFailed
        with self.breaker.attempt():
            return event_loop.run(self._complete(question, seconds), seconds, late)

    async def _verify(self) -> None:
        for fingerprint, spelling in list(self._unverified.items()):
            await verify(self.endpoint, self.name, spelling)
            self._unverified.pop(fingerprint, None)

    async def _complete(self, question: Question, seconds: float) -> Answer:
        if self._unverified:
            await self._verify()
        tab = Tab(question)
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(EndpointBusy),
            stop=stop_after_attempt(self.attempts) | stop_before_delay(seconds),
            wait=_as_told,
            reraise=True,
        )
        async for attempt in retrying:
            with attempt:
                return await self._ask(question, tab)
        raise EscalationFailed("no attempt was made.")  # not reached: reraise is set

    async def _ask(self, question: Question, tab: Tab) -> Answer:
        """One request; two where the first is late, unless the endpoint is on trial: then one alone tries it."""
        if self.hedge_after_s is None or self.breaker.state != "closed":
            return await self._once(question, tab.line(), lambda: None)
        before = len(tab)
        answer = await hedged(lambda sent: self._once(question, tab.line(), sent), self.hedge_after_s)
        if len(tab) == before + 1:
            return answer
        return replace(answer, note="; ".join(filter(None, (HEDGED, answer.note))))

    async def _once(self, question: Question, owe: Owe, sent: Callable[[], None]) -> Answer:
        def leaves() -> None:
            owe(self.worst(question))
            sent()

        try:
            async with asyncio.timeout(self.attempt_s):
                content = await self._post(question, owe, leaves)
        except TimeoutError:
            raise EscalationFailed(f"no answer within {self.attempt_s:.3g} s.") from None
        reply = completions.parse(content, len(question.ids))
        if reply.usage is not None:
            used = reply.usage
            owe(
                charge(
                    self.price,
                    input_tokens=used.prompt_tokens,
                    cached_tokens=used.cached_tokens,
                    output_tokens=used.completion_tokens,
                )
            )
        return completions.answer(reply, question.candidates)

    async def _post(self, question: Question, owe: Owe, sent: Callable[[], None]) -> bytes:
        """The reply's body; a server that declines has done nothing, so nothing is owed."""
        by_id = self._by_id
        body = completions.request(self.name, question.ids, question.candidates, by_id=by_id)
        try:
            return await self.endpoint.post("completions", body, sent=sent)
        except (EndpointBusy, EndpointRefused) as error:
            owe(None)
            strict = isinstance(error, EndpointRefused) and "logprob_token_ids" in str(error)
            if not (by_id and strict):
                raise
        self._by_id = False  # a server that is strict about fields it does not know
        return await self._post(question, owe, sent)


def _as_told(state: RetryCallState) -> float:
    """Seconds until the next attempt: what Retry-After says, and a random bit more."""
    error = state.outcome.exception() if state.outcome else None
    told = error.wait_s if isinstance(error, EndpointBusy) else None
    return JITTER(state) + (told or 0.0)


class OpenAISession:
    """One generation's line to a server; every question stands alone."""

    def __init__(self, llm: OpenAILLM) -> None:
        self._llm = llm

    def quote(self, question: Question) -> Charge:
        """What its requests can cost at worst: one, or two where the LLM hedges."""
        worst = self._llm.worst(question)
        return worst if self._llm.hedge_after_s is None else together([worst, worst]) or worst

    def ask(self, question: Question) -> Answer:
        """See ``OpenAILLM``."""
        return self._llm.complete(question)

    def close(self) -> None:
        """Connections stay with the LLM."""
