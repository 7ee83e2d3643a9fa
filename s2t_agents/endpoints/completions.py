"""OpenAI's completions API with token ids, as vLLM speaks it: the fields and values that both its users read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

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


class UsageDetails(PartialModel):
    """More about the prompt's tokens."""

    cached_tokens: Count | None = None


class Usage(PartialModel):
    """The server's token counts."""

    prompt_tokens: Count
    completion_tokens: Count = 1
    prompt_tokens_details: UsageDetails | None = None

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens from the server's prefix cache; 0 if not reported."""
        details = self.prompt_tokens_details
        return min((details.cached_tokens or 0) if details else 0, self.prompt_tokens)


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
