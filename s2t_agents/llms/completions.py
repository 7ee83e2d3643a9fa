"""OpenAI's completions as a scorer: the request for one token's log-probabilities, and what a fit reply looks like."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import EscalationFailed
from .question import Answer

TOP = 20
"""Log-probabilities asked for where a server does not know ``logprob_token_ids``: vLLM's default limit."""
ID_PREFIX = "token_id:"
"""How a server spells a token under ``return_tokens_as_token_ids``."""
ROUNDING = 0.01
"""Nats by which a log-probability may lie above 0, and all of them together above 1."""
SLACK = 64
"""Tokens that a server may count beyond ours: those it adds by itself."""

LogProb = Annotated[float, Field(le=ROUNDING, allow_inf_nan=False, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]


class _Loose(BaseModel):
    """Only what is read here is checked; servers add fields of their own."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class _Logprobs(_Loose):
    top_logprobs: tuple[dict[str, LogProb], ...] = Field(min_length=1, max_length=1)


class _Choice(_Loose):
    logprobs: _Logprobs


class _Details(_Loose):
    cached_tokens: Count | None = None


class Usage(_Loose):
    """Tokens as the server counted them."""

    prompt_tokens: Count
    completion_tokens: Count = 1
    prompt_tokens_details: _Details | None = None

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that the server had cached; 0 where it does not say."""
        details = self.prompt_tokens_details
        return min((details.cached_tokens or 0) if details else 0, self.prompt_tokens)


class Reply(_Loose):
    """A completion of one token."""

    choices: tuple[_Choice, ...] = Field(min_length=1, max_length=1)
    usage: Usage | None = None


_FIELDS = frozenset(name for form in (Reply, _Choice, _Logprobs, Usage, _Details) for name in form.model_fields)
"""What an error may name; all else in a reply is the server's own text."""


def request(model: str, ids: Sequence[int], candidates: Sequence[int], *, by_id: bool) -> dict[str, Any]:
    """The body that asks for the candidates' log-probabilities after ``ids``.

    One request serves both kinds of server: vLLM answers ``logprob_token_ids`` and lets ``logprobs`` be; one that does
    not know the field answers with its own best.
    """
    body = {
        "model": model,
        "prompt": list(ids),
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": TOP,
        "return_tokens_as_token_ids": True,
    }
    return {**body, "logprob_token_ids": list(candidates)} if by_id else body


def parse(content: bytes, prompt_tokens: int) -> Reply:
    """A reply that can be believed.

    Raises:
        EscalationFailed: no JSON, other fields, NaN, log-probabilities that are none, or an absurd token count.
    """
    try:
        reply = Reply.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(at) if at in _FIELDS or isinstance(at, int) else "*" for at in first["loc"]) or "body"
        fault = f"the server's reply cannot be used: {where}: {first['msg']}."
    else:
        _check_usage(reply, prompt_tokens)
        return reply
    raise EscalationFailed(fault)  # out here it carries no chain, which would show the reply


def _check_usage(reply: Reply, prompt_tokens: int) -> None:
    if reply.usage is not None:
        prompt, completion = reply.usage.prompt_tokens, reply.usage.completion_tokens
        if not prompt_tokens <= prompt <= 2 * prompt_tokens + SLACK:
            raise EscalationFailed(f"the server says that {prompt_tokens} tokens were {prompt}.")
        if completion > 1 + SLACK:
            raise EscalationFailed(f"the server was asked for 1 token and says that it wrote {completion}.")


def answer(reply: Reply, candidates: Sequence[int]) -> Answer:
    """The candidates' scores.

    A candidate outside the server's best gets none. It could not have won: the best of those inside is likelier.

    Raises:
        EscalationFailed: tokens as text, ids that are none, more than all probability, or no candidate among them.
    """
    found = _by_id(reply.choices[0].logprobs.top_logprobs[0])
    if sum(map(math.exp, found.values())) > 1 + ROUNDING:
        raise EscalationFailed("the server's log-probabilities add up to more than 1.")
    scores = tuple(found.get(token) for token in candidates)
    missing = scores.count(None)
    if missing == len(candidates):
        raise EscalationFailed(f"none of the {len(candidates)} candidates is among the server's {len(found)} tokens.")
    note = f"{missing} of {len(candidates)} candidates outside the server's best {len(found)}" if missing else ""
    return Answer(scores, note=note)


def _by_id(top: dict[str, float]) -> dict[int, float]:
    try:
        return {int(_digits(token)): score for token, score in top.items()}
    except ValueError:
        raise EscalationFailed(
            "the server names tokens by their text, not their ids.",
            hint="It must know return_tokens_as_token_ids, as vLLM does; else take ChatJudge.",
        ) from None


def _digits(token: str) -> str:
    digits = token.removeprefix(ID_PREFIX)
    if digits == token or not (digits.isascii() and digits.isdecimal()) or len(digits) > 9:
        raise ValueError
    return digits
