"""``/v1/completions``: the model continues a text or token ids, without a chat template.

The same steps, account, ledger and budget as a chat answer, by the parts that ``ChatS2T`` is made of.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Generator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from langchain_core.messages import HumanMessage
from pydantic import Field

from ..call_scope import CallScope, scoped_items
from ..chat.accounting import Account
from ..chat.async_bridge import ThreadedIterator
from ..chat.attribution import current_caller
from ..chat.chat_model import ChatS2T
from ..chat.generation import Generation
from ..chat.local_work import LocalWork
from ..chat.logprobs import LogprobsReader
from ..chat.telemetry_messages import input_messages
from ..errors import BadRequest
from ..formats.tool_calls import PlainTextParser
from ..scheduling.admission import AdmissionTicket
from ..telemetry import AnswerRequest
from ..types import Sampling
from .chat_answers import DONE
from .error_responses import event_of
from .parameters import SamplingParameters, parse
from .tenants import Tenant

DEFAULT_TOKENS = 16
"""As OpenAI's."""


class CompletionRequest(SamplingParameters):
    """A request for a completion; a list of one prompt is one prompt."""

    prompt: str | list[int] | list[str] | list[list[int]] = Field(min_length=1)
    logprobs: int | None = Field(default=None, ge=0, le=5)


def completion_request(body: Mapping[str, Any]) -> CompletionRequest:
    """A request for a completion.

    Raises:
        BadRequest: a parameter that is missing, malformed, unknown or not supported; several prompts.
    """
    request = parse(CompletionRequest, body)
    if isinstance(request.prompt, list) and not isinstance(request.prompt[0], int) and len(request.prompt) > 1:
        raise BadRequest("There are several prompts.", param="prompt", hint="Send one request for each.")
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
            "prompt_tokens_details": {"cached_tokens": account.reused_tokens},
        }

    def _pieces(self) -> ThreadedIterator[tuple[str, list[dict[str, Any]]]]:
        """Text and log-probabilities of each step."""
        return ThreadedIterator(scoped_items(CallScope(), self._items()))

    def _items(self) -> Generator[AdmissionTicket | tuple[str, list[dict[str, Any]]] | None, None, None]:
        generation = self._generation = self._started()
        reader = LogprobsReader(generation, self._request.logprobs is not None)
        for each in generation.deltas():
            yield each if isinstance(each, AdmissionTicket) else (each.text, _content(reader))

    def _started(self) -> Generation:
        model, asked, tenant = self._chat_model, self._request, self._tenant
        engine = model.engine
        budget = tenant.budget or model.budget
        prompt = self._prompt_ids()
        work = LocalWork(budget)
        fitting = max(1, engine.slm.context_window - len(prompt))  # with none the engine refuses the prompt
        sampling = Sampling(
            temperature=model.temperature if asked.temperature is None else asked.temperature,
            top_p=model.top_p if asked.top_p is None else asked.top_p,
            seed=model.seed if asked.seed is None else asked.seed,
            max_tokens=min(asked.max_tokens or DEFAULT_TOKENS, fitting),
            logprobs=asked.logprobs,
        )
        room = work.reserve(sampling.max_tokens)  # last: what is held here is settled by the steps
        sampling = replace(sampling, max_tokens=room)
        account = Account.of(
            engine, prompt, current_caller(tenant.agent), device_price=model.device_price, budget=budget, work=work
        )
        on_step, stops = model.on_step, asked.stops or ()
        request = AnswerRequest(
            operation="text_completion",
            model=engine.slm.name,
            llm=account.llm,
            agent=account.caller.agent,
            thread_id=account.caller.thread_id,
            sampling=sampling,
            stop=stops,
            streamed=bool(asked.stream),
            structured=False,
            messages=lambda: input_messages([HumanMessage(engine.slm.tokenizer.decode(prompt))]),
        )
        steps = engine.run(
            prompt,
            sampling,
            budget=budget,
            cache_scope=tenant.cache_scope or model.cache_scope,
            on_asked=account.record_escalation,
        )
        return Generation(
            work.limiting(steps, engine.slm.eos_ids),
            account,
            parser=PlainTextParser(),
            tokenizer=engine.slm.tokenizer,
            eos_ids=engine.slm.eos_ids,
            room=room,
            stop=stops,
            ledger=model.ledger,
            on_step=(lambda step: on_step(account.trace_id, step)) if on_step else None,
            asked=request,
        )

    def _prompt_ids(self) -> Sequence[int]:
        given: Any = self._request.prompt
        if isinstance(given, list) and not isinstance(given[0], int):
            [given] = given
        if isinstance(given, str):
            return self._chat_model.get_token_ids(given)
        size = self._chat_model.engine.slm.vocab_size
        for token in given:
            if not 0 <= token < size:
                raise BadRequest(f"prompt holds the id {token}; the vocabulary has {size} tokens.", param="prompt")
        return list(given)


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
        "top_logprobs": [{one["token"]: one["logprob"] for one in each["top_logprobs"]} for each in told],
        "text_offset": [offset] * len(told),
    }


def _extend(scores: dict[str, list[Any]], more: Mapping[str, list[Any]]) -> None:
    for name, values in more.items():
        scores.setdefault(name, []).extend(values)
