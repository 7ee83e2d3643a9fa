"""Parameters of OpenAI's: what chat and plain completions share, and what is not served.

Hints are ignored; what would change an answer and is not served is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import BadRequest

HINTS = frozenset({
    "metadata", "moderation", "prediction", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
    "safety_identifier", "service_tier", "store", "user",
})  # fmt: skip
"""Ignored: they say who asks, what to keep, or how to be faster."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": (),
    "functions": (),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "repetition_penalty": (1,),
    "suffix": ("",),
    "top_k": (-1, 0),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Not supported: these values (and null) are what happens anyway; others are refused."""

_WAYS_OUT = {
    "functions": "Use tools.",
    "function_call": "Use tool_choice.",
    "n": "One request has one answer: send several.",
    "best_of": "One request has one answer: send several.",
    "reasoning_effort": "Use max_thinking_tokens.",
}

MAX_STOPS = 16
Stop = Annotated[str, Field(min_length=1, max_length=1000)]

Parsed = TypeVar("Parsed", bound="Parameters")


class Parameters(BaseModel):
    """A part of a request: strictly typed, closed to what is not known."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Parameters):
    """Options of a stream; obfuscation is never added."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class SamplingParameters(Parameters):
    """What chat and plain completions have in common."""

    model: str
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    max_tokens: int | None = Field(default=None, ge=1, le=2**31)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> SamplingParameters:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for stream=true alone")
        return self

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def stops(self) -> list[str] | None:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop


def parse(kind: type[Parsed], body: Mapping[str, Any]) -> Parsed:
    """A request's parameters.

    Raises:
        BadRequest: one is unknown, not supported, missing or malformed; named with its path.
    """
    try:
        return kind.model_validate({name: value for name, value in body.items() if _is_given(name, value)})
    except ValidationError as error:
        raise _refusal(error, kind.model_fields) from None


def _is_given(name: str, value: Any) -> bool:
    if value is None or name in HINTS:
        return False
    if name not in NEUTRAL:
        return True
    if any(value == same and isinstance(value, bool) == isinstance(same, bool) for same in NEUTRAL[name]):
        return False
    raise BadRequest(
        f"{name}={value!r:.80} is not supported.",
        param=name,
        code="unsupported_parameter",
        hint=_WAYS_OUT.get(name, "Leave it out."),
    )


def _refusal(error: ValidationError, known: Collection[str]) -> BadRequest:
    found = error.errors(include_url=False)[0]
    path = ".".join(str(part)[:60] for part in found["loc"])
    if found["type"] == "extra_forbidden":
        close = get_close_matches(path, known, n=1)
        hint = f"Did you mean {close[0]}?" if close else "Leave it out: it would have no effect."
        return BadRequest(f"Unknown parameter: {path!r}.", param=path, code="unknown_parameter", hint=hint)
    if found["type"] == "missing":
        return BadRequest(f"Missing parameter: {path!r}.", param=path, code="missing_required_parameter")
    return BadRequest(f"{path} is {found['input']!r:.120}: {found['msg']}.", param=path, code="invalid_value")
