"""Parameters of OpenAI's: what chat and plain completions share, and what is not served.

Hints are ignored; what would change an answer and is not served is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import ErrorDetails

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


class Part(BaseModel):
    """A part of a request: strictly typed; what is not known is left out.

    Lists say ``fail_fast``: a request has millions of entries, and an error for each would take gigabytes.
    """

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, frozen=True)


class Parameters(Part, extra="forbid"):
    """A part of a request that is closed to what is not known."""

    @model_validator(mode="before")
    @classmethod
    def _with_one_unknown_key(cls, given: Any) -> Any:
        """One is enough for a refusal."""
        if not isinstance(given, dict) or len(given) <= len(cls.model_fields):
            return given
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = next((name for name in given if name not in known), None)
        return {name: value for name, value in given.items() if name in known or name == unknown}


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
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @field_validator("stream_options")
    @classmethod
    def _of_a_stream(cls, given: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if given is not None and not info.data.get("stream"):
            raise ValueError("it is for stream=true alone")
        return given

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
        raise _refusal(error, body, kind.model_fields) from None


def _is_given(name: str, value: Any) -> bool:
    if value is None or name in HINTS:
        return False
    if name not in NEUTRAL:
        return True
    if any(value == same and isinstance(value, bool) == isinstance(same, bool) for same in NEUTRAL[name]):
        return False
    raise BadRequest(
        f"{name} is {_shown(value)}, which is not supported.",
        param=name,
        code="unsupported_parameter",
        hint=_WAYS_OUT.get(name, "Leave it out."),
    )


def _refusal(error: ValidationError, body: Mapping[str, Any], known: Collection[str]) -> BadRequest:
    where, found, *others = _most_telling(error.errors(include_url=False), body)
    path = ".".join(str(part)[:60] for part in where)
    if found["type"] == "extra_forbidden":
        close = get_close_matches(path, known, n=1) if len(where) == 1 else []
        hint = f"Did you mean {close[0]}?" if close else "Leave it out: it would have no effect."
        return BadRequest(f"Unknown parameter: {path!r}.", param=path, code="unknown_parameter", hint=hint)
    if found["type"] == "missing":
        return BadRequest(f"Missing parameter: {path!r}.", param=path, code="missing_required_parameter")
    wanted = dict.fromkeys([_said(found), *(_said(each).removeprefix("Input should be ") for each in others)])
    return BadRequest(f"{path} is {_shown(found['input'])}: {' or '.join(wanted)}.", param=path, code="invalid_value")


def _most_telling(errors: Sequence[ErrorDetails], body: Mapping[str, Any]) -> tuple[Any, ...]:
    """Path and errors of the first fault: of a union's alternatives, those that the value came closest to."""
    located = [(_located(each, body), each) for each in errors]
    first = located[0][0]
    inside = [each for each in located if each[0][: len(first)] == first]
    deepest = max((path for path, _ in inside), key=len)
    here = [each for path, each in inside if path == deepest]
    return deepest, *([each for each in here if not each["type"].endswith("_type")] or here)


def _located(error: ErrorDetails, body: Mapping[str, Any]) -> tuple[int | str, ...]:
    """Where it is in the body: pydantic's path without the names of a union's alternatives."""
    path: list[int | str] = []
    here: Any = body
    for part in error["loc"]:
        if part in here if isinstance(here, dict) else isinstance(here, list) and isinstance(part, int):
            path.append(part)
            here = here[part]
    return (*path, error["loc"][-1]) if error["type"] == "missing" else tuple(path)


def _said(error: ErrorDetails) -> str:
    if error["type"] in ("model_type", "dict_type"):  # pydantic's words name classes
        return "Input should be an object"
    return error["msg"].removeprefix("Value error, ")


def _shown(value: Any) -> str:
    """A value for a message, in a time that does not depend on its size."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return f"{(value[:120] if isinstance(value, str) else value)!r:.120}"
