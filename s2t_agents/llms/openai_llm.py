"""An LLM behind an OpenAI-compatible server: token ids in, log-probabilities out, one request per question."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from tenacity import (
    AsyncRetrying,
    retry_if_exception_type,
    stop_after_attempt,
    stop_before_delay,
)

from ..backends.fingerprint import tokenizer_fingerprint
from ..backends.loading import load_tokenizer
from ..backends.torch.loading import ends_listed
from ..budget.charges import charge_for, most_for
from ..endpoints import event_loop
from ..endpoints.circuit_breaker import CircuitBreaker
from ..endpoints.endpoint import Access, Endpoint, check_seconds
from ..endpoints.retries import retry_wait
from ..endpoints.tokenizer_check import TokenizerSample, Tokenizing, verify_tokenizer
from ..errors import ConfigError, EndpointBusy, EndpointRefused, EscalationFailed, OutOfTime, TokenizerMismatch
from ..identity import identity
from ..scheduling.language_model import LanguageModel
from ..types import Charge, Price
from . import completions
from .byte_plan import Planner
from .hedging import hedged
from .question import Answer, Question
from .request_costs import ReportCharge, RequestCosts, total_charge
from .served_question import ServedQuestion, by_bytes, by_tokens
from .token_map import ComparedTokens, Side, side_of, side_of_tokens
from .token_texts import TokenTexts

FORM, BROKEN = frozenset({400, 422}), 500
"""Statuses of a request whose form a server does not know; llama-cpp-python's answers 500, and names the field."""

HEDGED_NOTE = "asked twice: the first request was late"


class OpenAILLM(ComparedTokens):
    """A model behind ``/v1/completions``, as vLLM serves it: of the SLM's tokenizer, or of another one that is given.

    If the server supports ``logprob_token_ids``, every candidate is scored; otherwise its top 20 tokens are read, and
    the receipt says how many candidates were not among them. A server that takes no token ids is sent the prompt as
    text where that is read as the same tokens, and one that names tokens by their text is understood where its
    tokenizer is byte-level. The tokenizer is compared by the server's ``/tokenize`` if it has one; otherwise you must
    make sure that it is the SLM's.

    A failing server does not fail the answer: within ``timeout_s``, and within the budget's deadline, there is an LLM
    pick or the local pick stands. Only requests that cost nothing (429, 503, ...) are retried.

    Args:
        base_url: up to and including the version, as ``http://127.0.0.1:8000/v1``. Other machines need https.
        model: the server's name of the model.
        tokenizer: of the server's model, where it is not the SLM's: a fast tokenizer, a directory or a hub id. Then the
            candidates are scored by their bytes, see ``served_question``.
        chat_template: source that replaces that tokenizer's chat template.
        api_key: bearer token. It is never shown and not pickled.
        api_key_env: name of an environment variable with the key instead; is pickled.
        price: of its tokens, for dollar budgets; ``known_price(name)`` for a listed model, a ``TokenPrice`` for
            your own server, None if unknown. Tokens that the server reports as cached are charged as cached (vLLM:
            ``--enable-prompt-tokens-details``); if it does not report them, the whole prefix is charged.
        timeout_s: seconds for one question, retries included.
        attempt_s: seconds for one request.
        connect_s: seconds for one connection.
        attempts: maximum requests per question, hedged ones not counted.
        hedge_after_s: seconds without an answer after which a second, hedged request is sent; the first usable answer
            is taken and the other request cancelled. Both may be billed, so twice the cost is reserved for every
            question. None, the default, never hedges.
        breaker: circuit breaker, may be shared between LLMs behind one endpoint; its own by default.
        allow_http: permit plain HTTP to other machines.
        verify: as in httpx: True, or an ``ssl.SSLContext``.

    Raises:
        ConfigError: an invalid URL, key or time limit.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        tokenizer: Any = None,
        chat_template: str | None = None,
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
        check_seconds(timeout_s=timeout_s, attempt_s=attempt_s)
        if attempts < 1:
            raise ConfigError(f"attempts is {attempts}; at least 1 request is needed for an answer.")
        if hedge_after_s is not None and not 0 < hedge_after_s < min(attempt_s, timeout_s):
            raise ConfigError(
                f"hedge_after_s is {hedge_after_s}; it must lie above 0 and under attempt_s ({attempt_s}) and timeout_s"
                f" ({timeout_s}).",
                hint="Use about the 95th percentile of the server's answers, or None for no second request.",
            )
        super().__init__()
        self.name, self.price = model, price
        access = Access(
            api_key=api_key, api_key_env=api_key_env, allow_http=allow_http, verify=verify, connect_s=connect_s
        )
        self.endpoint = Endpoint(base_url, access)
        self.timeout_s, self.attempt_s, self.connect_s, self.attempts = timeout_s, attempt_s, connect_s, attempts
        self.hedge_after_s = hedge_after_s
        self.breaker = breaker or CircuitBreaker()
        self._asks_by_id = True
        self._takes_ids: bool | None = None  # None until it has answered once
        self._texts: dict[str, TokenTexts] = {}
        self._tokenizer, self.chat_template = tokenizer, chat_template
        self._given = {"tokenizer": identity(tokenizer), "chat_template": chat_template}  # before it is loaded
        self._end_ids: Sequence[int] = ()
        self._unverified: dict[str, TokenizerSample] = {}

    def __repr__(self) -> str:
        options = [f"{key}={value!r}" for key, value in self._given.items() if value is not None]
        return f"OpenAILLM({', '.join([repr(self.endpoint.display_url), repr(self.name), *options])})"

    def __getstate__(self) -> dict[str, Any]:
        """Pickles without the key and the breaker's state."""
        return {**self.__dict__, "breaker": None, "_maps": {}, "_texts": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.breaker = CircuitBreaker()

    def check(self, slm: Tokenizing) -> None:
        """Compare model name and tokenizer with the server's, as far as it offers them.

        If the server is down now, this is done before its first question.

        Raises:
            ModelNotFound: the server lists its models without this one.
            TokenizerMismatch: it tokenizes a sample text differently; or the tokenizer that was given for it, or the
                SLM's, cannot be followed byte by byte.
        """
        super().check(slm)
        spelling = TokenizerSample.of(self._spelled_like(slm))
        self._unverified[spelling.fingerprint] = spelling
        try:
            with self.breaker.attempt():
                event_loop.run_coroutine(self._verify(), 2 * self.connect_s)
        except EscalationFailed:
            return

    def given_tokenizer(self) -> Any:
        """The tokenizer that was given for the server's model; None where it has the SLM's."""
        if isinstance(self._tokenizer, str | Path):
            self._end_ids = ends_listed(str(self._tokenizer))
            self._tokenizer = load_tokenizer(str(self._tokenizer))
        return self._tokenizer

    def side(self) -> Side:
        """See ``ComparedTokens``."""
        tokenizer = self.given_tokenizer()
        ends = frozenset(i for i in (*self._end_ids, tokenizer.eos_token_id) if i is not None)
        return side_of_tokens(tokenizer, ends, self.name, self.chat_template)

    def texts(self, slm: LanguageModel) -> TokenTexts:
        """The server's tokens as text.

        Raises:
            EscalationFailed: a tokenizer cannot be followed byte by byte.
        """
        known = slm.tokenizer_fingerprint
        if known not in self._texts:
            tokens = self.token_map(slm)
            try:
                side = side_of(slm, None) if tokens is None else tokens.llm
            except TokenizerMismatch as error:
                raise EscalationFailed(f"{self.name!r} cannot be asked in text: {error}") from error
            self._texts[known] = TokenTexts(side, self.name)
        return self._texts[known]

    @property
    def tells(self) -> bool:
        """Whether the server scores the ids that it is given, as far as is known."""
        return self._asks_by_id and self._takes_ids is not False

    def _spelled_like(self, slm: Tokenizing) -> Tokenizing:
        """Whose spelling the server's must be."""
        tokenizer = self.given_tokenizer()
        return slm if tokenizer is None else GivenTokens(self.name, tokenizer, tokenizer_fingerprint(tokenizer))

    def open(self) -> OpenAISession:
        """A session; the prefix cache is the server's."""
        return OpenAISession(self)

    def close(self) -> None:
        """Close idle connections; the LLM can still be used."""
        event_loop.run_coroutine(self.endpoint.close(), self.connect_s)

    def max_charge(self, request: ServedQuestion) -> Charge:
        """The maximum cost of one request: all prompts at their dearest, and one output token of each."""
        return most_for(self.price, input_tokens=request.prompt_tokens, output_tokens=len(request.prompts))

    def complete(self, question: Question, request: ServedQuestion) -> Answer:
        """Ask the server one question, as this request.

        Raises:
            EscalationFailed: no usable answer in time.
            TokenizerMismatch, ModelNotFound: as ``check``, if the server could not be reached before.
        """
        seconds = self.timeout_s if question.seconds is None else min(self.timeout_s, question.seconds)
        if seconds <= 0:
            raise OutOfTime("the deadline has passed.")
        late = OutOfTime if seconds < min(self.timeout_s, self.attempt_s) else EscalationFailed
        with self.breaker.attempt():
            return event_loop.run_coroutine(self._complete(question, request, seconds), seconds, late)

    async def _verify(self) -> None:
        for fingerprint, spelling in list(self._unverified.items()):
            await verify_tokenizer(self.endpoint, self.name, spelling)
            self._unverified.pop(fingerprint, None)

    async def _complete(self, question: Question, request: ServedQuestion, seconds: float) -> Answer:
        if self._unverified:
            await self._verify()
        costs = RequestCosts(question)
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(EndpointBusy),
            stop=stop_after_attempt(self.attempts) | stop_before_delay(seconds),
            wait=retry_wait,
            reraise=True,
        )
        return await retrying(self._ask, request, costs)

    async def _ask(self, request: ServedQuestion, costs: RequestCosts) -> Answer:
        """One request, hedged if configured; not hedged while the circuit breaker probes the endpoint."""
        if self.hedge_after_s is None or self.breaker.state != "closed":
            return await self._attempt(request, costs.new_request(), lambda: None)
        before = len(costs)
        answer = await hedged(lambda sent: self._attempt(request, costs.new_request(), sent), self.hedge_after_s)
        if len(costs) == before + 1:
            return answer
        return replace(answer, note="; ".join(filter(None, (HEDGED_NOTE, answer.note))))

    async def _attempt(self, request: ServedQuestion, owe: ReportCharge, sent: Callable[[], None]) -> Answer:
        def on_sent() -> None:
            owe(self.max_charge(request))
            sent()

        try:
            async with asyncio.timeout(self.attempt_s):
                content = await self._post(request, owe, on_sent)
        except TimeoutError:
            raise EscalationFailed(f"no answer within {self.attempt_s:.3g} s.") from None
        completion = completions.parse_completion(content, request.prompt_tokens, len(request.prompts))
        if completion.usage is not None:
            used = completion.usage
            owe(
                charge_for(
                    self.price,
                    input_tokens=used.prompt_tokens,
                    output_tokens=used.completion_tokens,
                    **used.cache_counts,
                )
            )
        rows = completions.rows_of(completion, lambda text: request.texts().id_of(text))
        if not all(each in rows[0] for each in request.ids):
            self._asks_by_id = False  # it ignores the field
        return request.read(rows)

    async def _post(self, request: ServedQuestion, owe: ReportCharge, sent: Callable[[], None]) -> bytes:
        """The response body; an error status costs nothing, so nothing is owed.

        What the server refuses as a field or form that it does not know is said otherwise, and remembered.
        """
        by_id, takes_ids = self._asks_by_id, self._takes_ids
        prompts = request.prompts if takes_ids is not False else list(map(request.texts().prompt, request.prompts))
        body = completions.request_body(self.name, prompts, request.ids, by_id=by_id)
        try:
            content = await self.endpoint.post("completions", body, sent=sent)
        except (EndpointBusy, EndpointRefused) as error:
            owe(None)
            if by_id and isinstance(error, EndpointRefused) and "logprob_token_ids" in str(error):
                self._asks_by_id = False
                return await self._post(request, owe, sent)
            refused_form = error.status in FORM or (error.status == BROKEN and "prompt" in str(error))
            if takes_ids is None and refused_form:
                return await self._as_text(request, owe, sent, error)
            raise
        self._takes_ids = takes_ids is not False
        return content

    async def _as_text(
        self, request: ServedQuestion, owe: ReportCharge, sent: Callable[[], None], refused: EscalationFailed
    ) -> bytes:
        """The prompt as text, once, to a server that has refused its ids; ``refused`` if that is no better."""
        self._takes_ids = False
        try:
            return await self._post(request, owe, sent)
        except EscalationFailed as error:
            self._takes_ids = None
            if isinstance(error, EndpointBusy):
                raise
            raise refused from None


@dataclass(frozen=True)
class GivenTokens:
    """A tokenizer as ``Tokenizing`` has it."""

    name: str
    tokenizer: Any
    tokenizer_fingerprint: str


class OpenAISession:
    """One generation's session with a server; questions are independent."""

    def __init__(self, llm: OpenAILLM) -> None:
        self._llm = llm
        self._planner: Planner | None = None
        self._request: tuple[Question, ServedQuestion] | None = None

    def quote(self, question: Question) -> Charge:
        """The maximum cost: of one request, or of two if the LLM hedges."""
        one_request = self._llm.max_charge(self._requested(question))
        return (
            one_request if self._llm.hedge_after_s is None else total_charge([one_request, one_request]) or one_request
        )

    def ask(self, question: Question) -> Answer:
        """See ``OpenAILLM``."""
        return self._llm.complete(question, self._requested(question))

    def _requested(self, question: Question) -> ServedQuestion:
        if self._request is None or self._request[0] is not question:
            self._request = question, self._make(question)
        return self._request[1]

    def _make(self, question: Question) -> ServedQuestion:
        tokens = self._llm.token_map(question.prefix.model) if question.prefix is not None else None
        if tokens is None:
            return by_tokens(question, partial(self._texts, question))
        if self._planner is None:
            self._planner = Planner(self._llm.name, tokens)
        return by_bytes(self._planner.plan(question), partial(self._texts, question), tells=self._llm.tells)

    def _texts(self, question: Question) -> TokenTexts:
        if question.prefix is None:
            raise EscalationFailed(f"{self._llm.name!r} takes text alone, and whose tokens these are is not known.")
        return self._llm.texts(question.prefix.model)

    def close(self) -> None:
        """Nothing to release: connections belong to the LLM."""
