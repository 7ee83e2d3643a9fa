"""OpenAI's completions API with token ids, as vLLM speaks it: the fields and values that all its users read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..budget.charges import cache_counts
from ..errors import EscalationFailed

TOP_LOGPROBS = 20
"""``logprobs`` requested: vLLM's default limit."""
ID_PREFIX = "token_id:"
"""Prefix of a token under ``return_tokens_as_token_ids``."""
LOGPROB_TOLERANCE = 0.01
"""Tolerance: by how many nats a log-probability may exceed 0, and by how much the probabilities' sum may exceed 1."""

LogProb = Annotated[float, Field(le=LOGPROB_TOLERANCE, allow_inf_nan=False, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]


class PartialModel(BaseModel):
    """Validates the fields that are read here and ignores others, which servers add."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        """Its field names may be shown."""
        super().__pydantic_init_subclass__(**options)
        _FIELD_NAMES.update(cls.model_fields)

    @classmethod
    def read(cls, content: bytes, fault: str, *, hint: str = "") -> Self:
        """Parse and validate JSON of a server.

        Args:
            content: as it came.
            fault: the beginning of the error's message, which goes on with the field; no other text of the server.
            hint: of the error.

        Raises:
            EscalationFailed: not JSON, missing fields, NaN, values that cannot be.
        """
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(at) if at in _FIELD_NAMES or isinstance(at, int) else "*" for at in first["loc"])
        # raised outside the handler: no exception chain, which would show the content
        raise EscalationFailed(f"{fault}: {where or 'body'}: {first['msg']}.", hint=hint)


_FIELD_NAMES: set[str] = set()
"""Of all these models; other keys are text of the server."""


class OneTokenLogprobs(PartialModel):
    """The likeliest tokens of a completion of one token."""

    top_logprobs: tuple[dict[str, LogProb], ...] = Field(min_length=1, max_length=1)


class UsageDetails(PartialModel):
    """More about the prompt's tokens."""

    cached_tokens: Count | None = None
    cache_write_tokens: Count | None = None


class Usage(PartialModel):
    """The server's token counts."""

    prompt_tokens: Count
    completion_tokens: Count = 1
    prompt_tokens_details: UsageDetails | None = None

    @property
    def cache_counts(self) -> dict[str, int]:
        """Prompt tokens from the server's prefix cache and written to it, as of ``charge_for``; 0 if not reported."""
        details = self.prompt_tokens_details
        return cache_counts(dict(details) if details else {}, self.prompt_tokens) or {}


def token_id(token: str) -> int:
    """The id of a token as ``return_tokens_as_token_ids`` writes it.

    Raises:
        EscalationFailed: it is the token's text.
    """
    digits = token.removeprefix(ID_PREFIX)
    if digits == token or not (digits.isascii() and digits.isdecimal()) or len(digits) > 9:
        raise EscalationFailed(
            "the server names tokens by their text, not their ids.",
            hint="It must know return_tokens_as_token_ids, as vLLM does; an LLM without it can be asked by ChatJudge.",
        )
    return int(digits)


def logprobs_by_id(top: Mapping[str, float]) -> dict[int, float]:
    """Log-probabilities by token id; errors as ``token_id``."""
    return {token_id(token): score for token, score in top.items()}


def checked(
    logprobs: dict[int, float], *, vocab_size: int | None = None, hint: str = "Name the tokenizer of its model."
) -> dict[int, float]:
    """Log-probabilities by token id, as given.

    Args:
        logprobs: of one position.
        vocab_size: no token id reaches it; None knows of none.
        hint: what to do about one that does.

    Raises:
        EscalationFailed: a token id that cannot be, or probabilities above 1 in sum.
    """
    if vocab_size is not None and (outside := [token for token in logprobs if not 0 <= token < vocab_size]):
        raise EscalationFailed(f"the server listed token {outside[0]}; the tokenizer has {vocab_size}.", hint=hint)
    if sum(map(math.exp, logprobs.values())) > 1 + LOGPROB_TOLERANCE:
        raise EscalationFailed("the server's log-probabilities add up to more than 1.")
    return logprobs
