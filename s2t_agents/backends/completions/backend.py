"""A model on a server (``vllm://``), behind OpenAI's completions API; what is asked again after a fault.

engine ── append token ──> is it what the server went on with?
                             yes: the next prediction of the stream, mostly there already
                             no (a grammar, the LLM, sampling): hang up, ask again from here;
                             the server's prefix cache makes that cheap

The server names its best 20 tokens a position, all others are unknown: their logits are -inf here.
"""

from __future__ import annotations

import hashlib
import math
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import torch
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, stop_before_delay
from torch import Tensor

from ...endpoints import event_loop
from ...endpoints.circuit_breaker import CircuitBreaker
from ...endpoints.completions import TOP_LOGPROBS
from ...endpoints.endpoint import Access, Endpoint, check_seconds
from ...endpoints.loopback import is_loopback
from ...endpoints.retries import retry_wait
from ...endpoints.served_selection import ServerSelection, read_back
from ...endpoints.spending import Spending
from ...endpoints.tokenizer_check import TokenizerSample, verify_tokenizer
from ...errors import ConfigError, EndpointBusy, EscalationFailed, ModelServerRefused
from ...fork_safety import FORWARD, hold_while_forking
from ..base import Append, Capabilities, Limits, Output, SequenceCache, StepOutput, Work
from ..deadline import Deadline
from ..fingerprint import tokenizer_fingerprint
from .faults import model_server_errors
from .stream import CompletionStream, Prediction

SCHEME = "vllm://"
"""Of addresses: ``vllm://host:port/name``, the name as the server lists it."""

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^][:/@?#\s]+)(:[0-9]+)?")

UNKNOWN_WEIGHTS = "server-"
"""How a fingerprint begins that tells addresses apart, not weights."""

TOKEN_BYTES = 8
FIRST = 1e-3
"""Nats by which the small model's best token is put above the selector's: how far it was, the server does not say."""


@dataclass(frozen=True)
class ServerOptions(Access):
    """How a server is connected to, and how it is asked.

    Attributes:
        timeout_s: seconds without a token after which a request has failed; reading the prompt comes before the first.
        attempts: requests for one token, where the server declines for now (429, 503, ...) or breaks off.
        read_ahead: tokens that one request may write; what the answer does not use of them is wasted.
        context_window: tokens; None asks the server, which may not say.
        eos_token_ids: tokens that end an answer; None takes the tokenizer's.
    """

    timeout_s: float = 60.0
    attempts: int = 3
    read_ahead: int = 256
    context_window: int | None = None
    eos_token_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Check the limits (ConfigError)."""
        super().__post_init__()
        check_seconds(timeout_s=self.timeout_s)
        for name in ("attempts", "read_ahead"):
            if not getattr(self, name) >= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 1 or more.")


class CompletionCache(SequenceCache):
    """One sequence on the server: its token ids here, its KV there; see ``base.SequenceCache``."""

    def __init__(self, ids: Sequence[int] = ()) -> None:
        self.ids = list(ids)
        self.stream: CompletionStream | None = None
        self.end: int | None = None
        """Length at which no prediction is wanted any more; None where nobody said."""
        self.selection: ServerSelection | None = None
        """Of the server's own selector after the last token, where it was triggered."""

    @property
    def length(self) -> int:
        """Tokens in it."""
        return len(self.ids)

    @property
    def read(self) -> int:
        """All of them."""
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        """Bytes on this machine: of the ids."""
        return TOKEN_BYTES * len(self.ids)

    def fork(self, length: int) -> CompletionCache:
        """The first ``length`` tokens; the server's prefix cache has their KV."""
        return CompletionCache(self.ids[:length])

    def truncate(self, length: int) -> None:
        """Forget all tokens after the first ``length``."""
        if length < len(self.ids):
            self.park()
            del self.ids[length:]

    def expect(self, length: int) -> None:
        """No request reads further ahead."""
        self.end = length

    def park(self) -> None:
        """Hang up."""
        if self.stream is not None:
            self.stream.close()
            self.stream = None

    def close(self) -> None:
        """Hang up and forget the tokens."""
        self.park()
        self.ids = []

    def __del__(self) -> None:
        if self.stream is not None:
            self.stream.abandon()


class CompletionsBackend:
    """A model on a server; see ``base.Backend``. The address is ``vllm://host:port/name``.

    It needs token ids as prompts and ``return_tokens_as_token_ids``, as vLLM has them, and is best with vLLM's
    ``allowed_token_ids``, and where end tokens are shown as others are. Plain HTTP goes to loopback addresses only,
    unless it is permitted.

    Args:
        name: of the model, as the server lists it.
        endpoint: of the server.
        tokenizer: a fast one, the model's.
        options: how it is asked.
        breaker: circuit breaker of the server.

    Attributes:
        spending: pays for every request: the whole prompt and what was written of the answer; None counts nothing.

    Raises:
        ConfigError: a tokenizer without an end token, and none given.
    """

    library = "server"
    quantization = "unknown"
    checkpoint_fingerprint: str | None = None

    def __init__(
        self,
        name: str,
        endpoint: Endpoint,
        tokenizer: Any,
        *,
        options: ServerOptions | None = None,
        breaker: CircuitBreaker | None = None,
    ) -> None:
        self.served_name, self.endpoint, self._options = name, endpoint, options or ServerOptions()
        self.spending: Spending | None = None
        self.name = f"{SCHEME}{endpoint.url.netloc.decode('ascii')}/{name}"
        self.given_tokenizer = self.tokenizer = tokenizer
        self.architecture, self.hidden_size = "unknown", 0
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.context_window = self._options.context_window or 0
        self.eos_ids = self._ends()
        self.device = torch.device("cpu")
        self.lock = threading.RLock()
        hold_while_forking(self, "lock", FORWARD)
        self.capabilities = Capabilities(
            batching=False,
            candidate_scoring=False,
            candidate_lora=False,
            hidden_states=False,
            truncation=True,
            fork_while_running=True,
            concurrent_forwards=True,
            all_logits=False,
        )
        self.limits = Limits()
        self.breaker = breaker or CircuitBreaker()
        self.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
        self.weights_fingerprint = f"{UNKNOWN_WEIGHTS}{hashlib.sha256(self.name.encode()).hexdigest()[:16]}"
        """Which weights a server has, it does not say: this tells addresses apart."""

    @classmethod
    def load(cls, address: str, *, tokenizer: Any, **options: Any) -> CompletionsBackend:
        """Connect to a server.

        Args:
            address: ``vllm://host:port/name``.
            tokenizer: a fast one, the model's.
            options: see ``ServerOptions``.

        Raises:
            ConfigError: an option or address that cannot be; an unknown context window.
            ModelNotFound: the server has other models.
            TokenizerMismatch: it tokenizes a sample text differently.
            ModelServerError: it cannot be reached, is too late, or wants another key.
        """
        host, name = split_address(address)
        try:
            wanted = ServerOptions(**options)
        except TypeError as error:
            known = ", ".join(ServerOptions.__dataclass_fields__)
            raise ConfigError(
                f"a server takes no such option: {error}.", hint=f"It takes tokenizer, {known}."
            ) from error
        endpoint = Endpoint(server_url(host, allow_http=wanted.allow_http), wanted)
        backend = cls(name, endpoint, tokenizer, options=wanted)
        backend.connect()
        return backend

    def connect(self) -> None:
        """Compare name and tokenizer with the server's; errors as ``load``."""
        asking = verify_tokenizer(
            self.endpoint,
            self.served_name,
            TokenizerSample.of(self),
            hint='Give the tokenizer of the model that it serves: model_kwargs={"tokenizer": ...}.',
        )
        with model_server_errors(self.name):
            served = event_loop.run_coroutine(asking, 2 * self._options.connect_s + 2)
        listed = served.max_model_len if served else None
        window = self._options.context_window or listed
        if window is None:
            raise ConfigError(
                f"the server of {self.name!r} does not say how many tokens fit its context window.",
                hint='Say it: model_kwargs={"context_window": ...}.',
            )
        self.context_window = min(window, listed or window)

    @property
    def output_embedding(self) -> Tensor:
        """Not here.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"the weights of {self.name!r} are on its server; a selector needs them.",
            hint="Load the checkpoint itself, or leave the selector out: triggers and the LLM work as ever.",
        )

    def new_cache(self) -> CompletionCache:
        """An empty one."""
        return CompletionCache()

    def interrupt(self) -> None:
        """Nothing: no forward of another caller waits for this one, and who leaves hangs up."""

    def resume(self) -> None:
        """Nothing."""

    def forward(self, batch: Sequence[Work]) -> list[Output]:
        """One token's prediction each; streams of several sequences arrive at once.

        Raises:
            ModelServerError: no prediction.
            S2TError: of an item's deadline.
        """
        return [self._append(item) for item in batch]

    def among(self, cache: CompletionCache, allowed: Tensor, deadline: Deadline | None = None) -> Tensor:
        """Logits ``[V]`` after the sequence where none of the known tokens is ``allowed`` ``[V]`` bool.

        A selector of the server's has no say there: none of its candidates is legal.

        Raises:
            ModelServerRefused: the server does not know ``allowed_token_ids``.
            ModelServerError: no answer.
            S2TError: of the deadline.
        """
        cache.park()
        cache.selection = None
        legal = allowed.nonzero()[:, 0].tolist()

        def ask() -> Prediction | None:
            stream = self._request(cache, 1, allowed_token_ids=legal)
            try:
                return stream.after(cache.ids, self._options.timeout_s, deadline)
            finally:
                stream.close()

        with model_server_errors(self.name), self.breaker.attempt():
            found = self._retrying(deadline)(ask)
        known = {token: value for token, value in (found.logprobs if found else {}).items() if bool(allowed[token])}
        if not known:
            raise ModelServerRefused(
                f"none of the server's best {TOP_LOGPROBS} tokens is legal here; it knows no allowed_token_ids.",
                hint="Serve the model with vLLM.",
            )
        return self._logits(known).log_softmax(0)

    def _append(self, item: Work) -> StepOutput:
        if not isinstance(item, Append):
            raise ConfigError(f"{self.name!r} scores no candidates: its hidden states stay on its server.")
        cache: CompletionCache = item.cache
        cache.truncate(item.length)
        cache.ids += item.ids.tolist()
        try:
            with model_server_errors(self.name), self.breaker.attempt():
                prediction = self._next(cache, item.deadline)
                if prediction is None:
                    prediction = self._retrying(item.deadline)(self._anew, cache, item.deadline)
        except BaseException:
            cache.park()
            raise
        cache.selection = selected = read_back(prediction.logprobs)
        if selected is None:
            logits = self._logits(prediction.logprobs)
        else:
            logits = self._logits(_as_wanted(selected)).log_softmax(0)
        return StepOutput(logits, torch.empty(0))

    def _retrying(self, deadline: Deadline | None) -> Retrying:
        left_s = math.inf if deadline is None else deadline.end_s()
        return Retrying(
            retry=retry_if_exception_type(EndpointBusy),
            stop=stop_after_attempt(self._options.attempts) | stop_before_delay(min(self._options.timeout_s, left_s)),
            wait=retry_wait,
            reraise=True,
        )

    def _next(self, cache: CompletionCache, deadline: Deadline | None) -> Prediction | None:
        """The running stream's next prediction; None where it leads no further."""
        stream, cache.stream = cache.stream, None
        return None if stream is None else self._of(stream, cache, deadline)

    def _anew(self, cache: CompletionCache, deadline: Deadline | None) -> Prediction:
        """A new stream's first prediction."""
        end = min(self.context_window, cache.end or self.context_window)
        stream = self._request(cache, max(1, min(self._options.read_ahead, end - cache.length)))
        found = self._of(stream, cache, deadline)
        if found is not None:
            return found
        if len(self.eos_ids) != 1:
            raise EscalationFailed(f"{self.served_name!r} ended its answer by a token that the server does not show.")
        (end,) = self.eos_ids  # an empty completion: the end token, which this server does not show
        return Prediction(end, {end: 0.0})

    def _of(self, stream: CompletionStream, cache: CompletionCache, deadline: Deadline | None) -> Prediction | None:
        """A stream's prediction after the sequence, which keeps the stream; None where it leads no further."""
        found: Prediction | None = None
        try:
            found = stream.after(cache.ids, self._options.timeout_s, deadline)
        except EscalationFailed:
            if not (stream.over and len(stream)):
                raise
            # it had begun well and broke off: a new one goes on from here
        finally:
            if found is None:
                stream.close()
        if found is not None:
            cache.stream = stream
        return found

    def _request(self, cache: CompletionCache, tokens: int, **more: Any) -> CompletionStream:
        body = {
            "model": self.served_name,
            "prompt": list(cache.ids),  # the sequence may go on before it is sent
            "max_tokens": tokens,
            "temperature": 0,
            "logprobs": TOP_LOGPROBS,
            "return_tokens_as_token_ids": True,
            "repetition_penalty": 1.0,  # else the model's generation_config.json may say another, and vLLM follows it
            "skip_special_tokens": False,
            "stream": True,
            **more,
        }
        payment = None if self.spending is None else self.spending.hold(cache.length, tokens)
        return CompletionStream(
            self.endpoint,
            body,
            start=cache.length,
            vocab_size=self.vocab_size,
            payment=payment,
        )

    def _logits(self, known: dict[int, float]) -> Tensor:
        logits = torch.full((self.vocab_size,), -torch.inf)
        logits[list(known)] = torch.tensor(list(known.values()))
        return logits

    def _ends(self) -> frozenset[int]:
        given = self._options.eos_token_ids
        ends = frozenset([self.tokenizer.eos_token_id] if given is None else given) - {None}
        if not ends or not all(type(each) is int and 0 <= each < self.vocab_size for each in ends):
            raise ConfigError(
                f"the end tokens of {self.served_name!r} are {sorted(map(str, ends))}.",
                hint='Name their ids: model_kwargs={"eos_token_ids": [...]}.',
            )
        return ends


def _as_wanted(selection: ServerSelection) -> dict[int, float]:
    """Log-probabilities of the candidates with the small model's own best token first."""
    known = dict(selection.candidates)
    if selection.wanted is not None:
        known[selection.wanted] = max(known.values()) + FIRST
    return known


def split_address(address: str) -> tuple[str, str]:
    """Host with port, and the model's name, of ``vllm://host:port/name``.

    Raises:
        ConfigError: something else; it is not repeated, since any part may be a key.
    """
    host, _, name = address.removeprefix(SCHEME).partition("/")
    if not name or not _is_host(host) or not {"?", "#"}.isdisjoint(name):
        raise ConfigError(
            "the URL of the model's server cannot be read.",
            hint="It reads vllm://host:port/name, the name as the server lists it; give the key as api_key.",
        )
    return host, name


def _is_host(host: str) -> bool:
    """Whether it is a host, or one with a port, and nothing beside."""
    if _HOST.fullmatch(host) is None:
        return False
    try:
        return 0 < (httpx.URL(f"http://{host}").port or 80) < 65536
    except httpx.InvalidURL:
        return False


def server_url(host: str, *, allow_http: bool) -> str:
    """The base URL of a host as ``split_address`` gives it: plain HTTP on this machine, and where it is permitted."""
    plain = allow_http or is_loopback(httpx.URL(f"http://{host}").host)
    return f"{'http' if plain else 'https'}://{host}/v1"
