"""``/v1/completions``: the model continues a text or token ids, without a chat template.

The same steps, account, ledger and budget as a chat answer, by the parts that ``ChatS2T`` is made of.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Generator, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Any

from langchain_core.messages import HumanMessage
from pydantic import Field

from ..call_scope import CallScope, scoped_items
from ..chat.answer import AnswerContext, begin_answer
from ..chat.async_bridge import ThreadedIterator
from ..chat.attribution import current_caller
from ..chat.call_arguments import timeout_of
from ..chat.chat_model import ChatS2T, as_list
from ..chat.generation import Generation, GenerationRequest
from ..chat.local_work import LocalWork
from ..chat.logprobs import LogprobsReader
from ..chat.telemetry_messages import input_messages
from ..endpoints.completions import ID_PREFIX, TOP_LOGPROBS
from ..errors import BadRequest
from ..formats.tool_calls import PlainTextParser
from ..grammar.allowed_tokens import AllowedTokens
from ..scheduling.admission import AdmissionTicket
from ..types import MAX_LOGPROBS, Sampling
from .chat_answers import DONE, cached_tokens_entry
from .error_responses import event_of
from .parameters import Parameters, SamplingParameters, parse
from .tenants import Tenant

DEFAULT_TOKENS = 16
"""As OpenAI's."""
MAX_LOGPROB_IDS = 128
"""Tokens whose log-probabilities a request may ask for by id."""


_FAIL_FAST = Field(fail_fast=True)
Ids = Annotated[list[int], _FAIL_FAST]


class CompletionRequest(SamplingParameters):
    """A request for a completion; a list of one prompt is one prompt.

    The parameters after ``logprobs`` are vLLM's, by which ``ChatS2T(model="vllm://...")`` and ``OpenAILLM`` ask.
    """

    prompt: str | Ids | Annotated[list[str], _FAIL_FAST] | Annotated[list[Ids], _FAIL_FAST] = Field(min_length=1)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    logprob_token_ids: Ids | None = Field(default=None, min_length=1, max_length=MAX_LOGPROB_IDS)
    allowed_token_ids: Ids | None = Field(default=None, min_length=1)
    return_tokens_as_token_ids: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    add_special_tokens: bool = True


class TokenizeRequest(Parameters):
    """A request for a text's token ids, as vLLM has it."""

    model: str
    prompt: str
    add_special_tokens: bool = True


def completion_request(body: Mapping[str, Any]) -> CompletionRequest:
    """A request for a completion.

    Raises:
        BadRequest: a parameter that is missing, malformed, unknown or not supported; several prompts.
    """
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) > 1 and isinstance(prompt[0], str | list):  # before each is read
        raise BadRequest("There are several prompts.", param="prompt", hint="Send one request for each.")
    request = parse(CompletionRequest, body)
    if request.logprob_token_ids is not None and request.logprobs is None:
        raise BadRequest("logprob_token_ids needs logprobs.", param="logprob_token_ids")
    return request


class Completion:
    """One completion.

    Args:
        chat_model: whose model continues the prompt.
        request: what is asked for.
        tenant: who asks.
    """

    def __init__(self, chat_model: ChatS2T, request: CompletionRequest, tenant: Tenant) -> None:
        self._chat_model, self._request, self._tenant = chat_model, request, tenant
        self._generation: Generation | None = None
        self._head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "model": request.model}

    async def whole(self) -> dict[str, Any]:
        """OpenAI's ``text_completion``."""
        text, scores, offset = "", dict[str, list[Any]](), 0
        async for piece, told in self._pieces():
            _extend(scores, _legacy(told, offset))
            text, offset = text + piece, offset + len(piece)
        generation = self._generation
        assert generation is not None
        choice = _choice(text, scores or None, generation.finish_reason)
        return {**self._described(), "choices": [choice], "usage": self._usage(), "s2t": generation.account.metadata()}

    async def events(self) -> AsyncIterator[bytes]:
        """The completion as server-sent events, the last one ``[DONE]``."""
        head, offset = self._described(), 0
        more: dict[str, Any] = {"usage": None} if self._request.with_usage else {}
        async with aclosing(self._pieces()) as pieces:
            async for piece, told in pieces:
                if piece or told:
                    yield event_of({**head, "choices": [_choice(piece, _legacy(told, offset) or None, None)], **more})
                    offset += len(piece)
        generation = self._generation
        assert generation is not None
        last = {**head, "choices": [_choice("", None, generation.finish_reason)], **more}
        yield event_of({**last, "s2t": generation.account.metadata()})
        if self._request.with_usage:
            yield event_of({**head, "choices": [], "usage": self._usage()})
        yield DONE

    def _described(self) -> dict[str, Any]:
        return {**self._head, "created": int(time.time())}

    def _usage(self) -> dict[str, Any]:
        assert self._generation is not None
        account = self._generation.account
        made = len(account.steps)
        return {
            "prompt_tokens": account.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": account.prompt_tokens + made,
            **cached_tokens_entry(account.reused_tokens),
        }

    def _pieces(self) -> ThreadedIterator[tuple[str, list[dict[str, Any]]]]:
        """Text and log-probabilities of each step."""
        return ThreadedIterator(scoped_items(CallScope(), self._items()))

    def _items(self) -> Generator[AdmissionTicket | tuple[str, list[dict[str, Any]]] | None, None, None]:
        generation = self._generation = self._started()
        name = (lambda token: f"{ID_PREFIX}{token}") if self._request.return_tokens_as_token_ids else None
        reader = LogprobsReader(generation, self._request.logprobs is not None, name=name)
        for each in generation.deltas():
            yield each if isinstance(each, AdmissionTicket) else (each.text, _content(reader))

    def _started(self) -> Generation:
        model, asked, tenant = self._chat_model, self._request, self._tenant
        engine = model.engine
        budget = tenant.budget or model.budget
        prompt, grammar = self._prompt_ids(), self._allowed()
        work = LocalWork(budget, timeout_s=timeout_of(model.timeout))
        fitting = max(1, engine.slm.context_window - len(prompt))  # with none the engine refuses the prompt
        sampling = Sampling(
            temperature=model.temperature if asked.temperature is None else asked.temperature,
            top_p=model.top_p if asked.top_p is None else asked.top_p,
            seed=model.seed if asked.seed is None else asked.seed,
            max_tokens=min(asked.max_tokens or DEFAULT_TOKENS, fitting),
            logprobs=asked.logprobs,
            logprob_ids=self._logprob_ids(),
            ignore_eos=asked.ignore_eos,
        )
        request = GenerationRequest(
            prompt,
            grammar,
            work.reserve(sampling.max_tokens),  # last: what is held here is settled by the steps
            PlainTextParser(),
            frozenset[int]() if asked.ignore_eos else engine.slm.eos_ids,
            stop=as_list(model.stop if asked.stops is None else asked.stops),
            with_special=not asked.skip_special_tokens,
        )
        scope = tenant.cache_scope or model.cache_scope
        return begin_answer(
            engine,
            request,
            sampling,
            AnswerContext(
                current_caller(tenant.agent), work, budget, scope, model.device_price, model.ledger, model.on_step
            ),
            operation="text_completion",
            streamed=bool(asked.stream),
            messages=lambda: input_messages([HumanMessage(engine.slm.tokenizer.decode(prompt))]),
        )

    def _prompt_ids(self) -> Sequence[int]:
        given: Any = self._request.prompt
        if isinstance(given, list) and not isinstance(given[0], int):
            [given] = given
        engine = self._chat_model.engine
        if isinstance(given, str):
            return self._chat_model.runtime.encoder.text_ids(
                given, limit=engine.slm.context_window - 1, add_special_tokens=self._request.add_special_tokens
            )
        engine.check_prompt(given)  # by its length, before each id is looked at
        return self._known(given, "prompt")

    def _known(self, ids: Sequence[int], name: str) -> list[int]:
        """Token ids of a parameter; BadRequest for one that is none."""
        size = self._chat_model.engine.slm.vocab_size
        for token in ids:
            if not 0 <= token < size:
                raise BadRequest(f"{name} holds the id {token}; the vocabulary has {size} tokens.", param=name)
        return list(ids)

    def _logprob_ids(self) -> list[int]:
        given = self._request.logprob_token_ids or ()
        if given and not self._chat_model.engine.slm.capabilities.all_logits:
            raise BadRequest(
                f"logprob_token_ids cannot be told: the model is on a server, which names its best {TOP_LOGPROBS}.",
                param="logprob_token_ids",
                hint="Leave it out: logprobs gives the likeliest.",
            )
        return self._known(given, "logprob_token_ids")

    def _allowed(self) -> AllowedTokens | None:
        """The tokens that may come; None for all."""
        if self._request.allowed_token_ids is None:
            return None
        slm, given = self._chat_model.engine.slm, self._request.allowed_token_ids
        if len(given) > slm.vocab_size:
            raise BadRequest(
                f"allowed_token_ids has {len(given)} ids; the vocabulary has {slm.vocab_size} tokens.",
                param="allowed_token_ids",
                hint="Send each once.",
            )
        ids = self._known(given, "allowed_token_ids")
        with_text = slm.with_text
        legal = [token for token in ids if with_text is None or bool(with_text[token])]
        if not legal:
            raise BadRequest("No token of allowed_token_ids has a text.", param="allowed_token_ids")
        return AllowedTokens(legal, slm.vocab_size)


def _content(reader: LogprobsReader) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = reader.new().get("logprobs", {}).get("content", [])
    return found


def _choice(text: str, logprobs: Mapping[str, Any] | None, reason: str | None) -> dict[str, Any]:
    return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _legacy(told: Sequence[Mapping[str, Any]], offset: int) -> dict[str, list[Any]]:
    """Log-probabilities in the form of ``/v1/completions``."""
    if not told:
        return {}
    return {
        "tokens": [each["token"] for each in told],
        "token_logprobs": [each["logprob"] for each in told],
        "top_logprobs": [
            {one["token"]: one["logprob"] for one in (*each["top_logprobs"], each) if one["logprob"] is not None}
            for each in told
        ],
        "text_offset": [offset] * len(told),
    }


def _extend(scores: dict[str, list[Any]], more: Mapping[str, list[Any]]) -> None:
    for name, values in more.items():
        scores.setdefault(name, []).extend(values)
