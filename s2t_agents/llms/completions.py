"""Candidate scores from OpenAI's completions API: request body, response validation, log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import Field

from ..endpoints.completions import (
    ID_PREFIX,
    TOP_LOGPROBS,
    OneTokenLogprobs,
    PartialModel,
    Usage,
    checked,
    logprobs_by_id,
)
from ..errors import EscalationFailed
from .question import Answer

MAX_EXTRA_TOKENS = 64
"""Tokens that a server may count beyond the request's, for tokens that it adds."""


class _Choice(PartialModel):
    logprobs: OneTokenLogprobs
    index: int = 0


class OneTokenCompletion(PartialModel):
    """A completion of one token of each prompt."""

    choices: tuple[_Choice, ...] = Field(min_length=1)
    usage: Usage | None = None


def request_body(
    model: str, prompts: Sequence[Sequence[int] | str], candidates: Sequence[int], *, by_id: bool
) -> dict[str, Any]:
    """The request body for the candidates' log-probabilities after each of the prompts, as token ids or text.

    It serves both kinds of server: vLLM honours ``logprob_token_ids`` and ignores ``logprobs``; one that does not know
    the field returns its top tokens.
    """
    body = {
        "model": model,
        "prompt": prompts[0] if len(prompts) == 1 else list(prompts),
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": TOP_LOGPROBS,
        "return_tokens_as_token_ids": True,
    }
    return {**body, "logprob_token_ids": list(candidates)} if by_id else body


def parse_completion(content: bytes, prompt_tokens: int, prompts: int = 1) -> OneTokenCompletion:
    """Parse and validate a response to so many prompts, of so many tokens together.

    Raises:
        EscalationFailed: not JSON, missing fields, NaN, invalid log-probabilities, or implausible token counts.
    """
    completion = OneTokenCompletion.read(content, "the server's reply cannot be used")
    if len(completion.choices) != prompts:
        raise EscalationFailed(f"the server was given {prompts} prompts and answered {len(completion.choices)}.")
    _check_usage(completion, prompt_tokens, prompts)
    return completion


def _check_usage(completion: OneTokenCompletion, prompt_tokens: int, prompts: int) -> None:
    if completion.usage is not None:
        prompt, written = completion.usage.prompt_tokens, completion.usage.completion_tokens
        if not prompt_tokens <= prompt <= 2 * prompt_tokens + MAX_EXTRA_TOKENS:
            raise EscalationFailed(f"the server says that {prompt_tokens} tokens were {prompt}.")
        if written > prompts + MAX_EXTRA_TOKENS:
            raise EscalationFailed(f"the server was asked for {prompts} tokens and says that it wrote {written}.")


def rows_of(completion: OneTokenCompletion, id_of: Callable[[str], int | None]) -> list[dict[int, float]]:
    """Log-probabilities by token id after each prompt, in the prompts' order.

    Args:
        completion: of all prompts.
        id_of: the token of a text, for a server that names tokens so; one that is unknown is left out.

    Raises:
        EscalationFailed: invalid ids, or probabilities above 1 in sum.
    """
    choices = sorted(completion.choices, key=lambda each: each.index)
    return [checked(_by_id(each.logprobs.top_logprobs[0], id_of)) for each in choices]


def _by_id(top: Mapping[str, float], id_of: Callable[[str], int | None]) -> dict[int, float]:
    if any(token.startswith(ID_PREFIX) for token in top):
        return logprobs_by_id(top)
    return {found: score for token, score in top.items() if (found := id_of(token)) is not None}


def to_answer(found: Mapping[int, float], candidates: Sequence[int]) -> Answer:
    """The candidates' scores.

    A candidate outside the server's top tokens gets None. It could not win, since every returned one is more likely.

    Args:
        found: log-probabilities by token id.
        candidates: ``[K]``.

    Raises:
        EscalationFailed: no candidate among them.
    """
    scores = tuple(found.get(token) for token in candidates)
    missing = scores.count(None)
    if missing == len(candidates):
        raise EscalationFailed(f"none of the {len(candidates)} candidates is among the server's {len(found)} tokens.")
    note = f"{missing} of {len(candidates)} candidates outside the server's best {len(found)}" if missing else ""
    return Answer(scores, note=note)
