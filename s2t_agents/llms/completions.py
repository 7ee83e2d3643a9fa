"""Candidate scores from OpenAI's completions API: request body, response validation, log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import EscalationFailed
from .question import Answer

TOP_LOGPROBS = 20
"""``logprobs`` requested, for servers without ``logprob_token_ids``: vLLM's default limit."""
ID_PREFIX = "token_id:"
"""Prefix of a token under ``return_tokens_as_token_ids``."""
LOGPROB_TOLERANCE = 0.01
"""Tolerance: by how many nats a log-probability may exceed 0, and by how much the probabilities' sum may exceed 1."""
MAX_EXTRA_TOKENS = 64
"""Tokens that a server may count beyond the request's, for tokens that it adds."""

LogProb = Annotated[float, Field(le=LOGPROB_TOLERANCE, allow_inf_nan=False, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]


class _PartialModel(BaseModel):
    """Validates the fields that are read here and ignores others, which servers add."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class _Logprobs(_PartialModel):
    top_logprobs: tuple[dict[str, LogProb], ...] = Field(min_length=1, max_length=1)


class _Choice(_PartialModel):
    logprobs: _Logprobs


class _Details(_PartialModel):
    cached_tokens: Count | None = None


class Usage(_PartialModel):
    """The server's token counts."""

    prompt_tokens: Count
    completion_tokens: Count = 1
    prompt_tokens_details: _Details | None = None

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens from the server's prefix cache; 0 if not reported."""
        details = self.prompt_tokens_details
        return min((details.cached_tokens or 0) if details else 0, self.prompt_tokens)


class Completion(_PartialModel):
    """A completion of one token."""

    choices: tuple[_Choice, ...] = Field(min_length=1, max_length=1)
    usage: Usage | None = None


_KNOWN_FIELDS = frozenset(
    name for form in (Completion, _Choice, _Logprobs, Usage, _Details) for name in form.model_fields
)
"""Field names that an error may show; other keys of a response are text of the server."""


def request_body(model: str, ids: Sequence[int], candidates: Sequence[int], *, by_id: bool) -> dict[str, Any]:
    """The request body for the candidates' log-probabilities after ``ids``.

    It serves both kinds of server: vLLM honours ``logprob_token_ids`` and ignores ``logprobs``; one that does not know
    the field returns its top tokens.
    """
    body = {
        "model": model,
        "prompt": list(ids),
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": TOP_LOGPROBS,
        "return_tokens_as_token_ids": True,
    }
    return {**body, "logprob_token_ids": list(candidates)} if by_id else body


def parse_completion(content: bytes, prompt_tokens: int) -> Completion:
    """Parse and validate a response.

    Raises:
        EscalationFailed: not JSON, missing fields, NaN, invalid log-probabilities, or implausible token counts.
    """
    try:
        completion = Completion.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = (
            ".".join(str(at) if at in _KNOWN_FIELDS or isinstance(at, int) else "*" for at in first["loc"]) or "body"
        )
        fault = f"the server's reply cannot be used: {where}: {first['msg']}."
    else:
        _check_usage(completion, prompt_tokens)
        return completion
    raise EscalationFailed(fault)  # raised outside the handler: no exception chain, which would show the response


def _check_usage(completion: Completion, prompt_tokens: int) -> None:
    if completion.usage is not None:
        prompt, written = completion.usage.prompt_tokens, completion.usage.completion_tokens
        if not prompt_tokens <= prompt <= 2 * prompt_tokens + MAX_EXTRA_TOKENS:
            raise EscalationFailed(f"the server says that {prompt_tokens} tokens were {prompt}.")
        if written > 1 + MAX_EXTRA_TOKENS:
            raise EscalationFailed(f"the server was asked for 1 token and says that it wrote {written}.")


def to_answer(completion: Completion, candidates: Sequence[int]) -> Answer:
    """The candidates' scores.

    A candidate outside the server's top tokens gets None. It could not win, since every returned one is more likely.

    Raises:
        EscalationFailed: tokens given as text, invalid ids, probabilities above 1 in sum, or no candidate among them.
    """
    found = _logprobs_by_id(completion.choices[0].logprobs.top_logprobs[0])
    if sum(map(math.exp, found.values())) > 1 + LOGPROB_TOLERANCE:
        raise EscalationFailed("the server's log-probabilities add up to more than 1.")
    scores = tuple(found.get(token) for token in candidates)
    missing = scores.count(None)
    if missing == len(candidates):
        raise EscalationFailed(f"none of the {len(candidates)} candidates is among the server's {len(found)} tokens.")
    note = f"{missing} of {len(candidates)} candidates outside the server's best {len(found)}" if missing else ""
    return Answer(scores, note=note)


def _logprobs_by_id(top: dict[str, float]) -> dict[int, float]:
    try:
        return {int(_token_id_digits(token)): score for token, score in top.items()}
    except ValueError:
        raise EscalationFailed(
            "the server names tokens by their text, not their ids.",
            hint="It must know return_tokens_as_token_ids, as vLLM does; else take ChatJudge.",
        ) from None


def _token_id_digits(token: str) -> str:
    digits = token.removeprefix(ID_PREFIX)
    if digits == token or not (digits.isascii() and digits.isdecimal()) or len(digits) > 9:
        raise ValueError
    return digits
