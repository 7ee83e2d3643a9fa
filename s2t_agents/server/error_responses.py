"""Errors as OpenAI's clients read them: one table from this package's errors to HTTP statuses."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

from .. import errors
from ..redaction import storable


@dataclass(frozen=True)
class ErrorShape:
    """How one kind of error is told.

    Attributes:
        status: HTTP status.
        kind: OpenAI's ``type``.
        code: OpenAI's ``code``.
        headers: of the response.
        shown: whether the client sees the message, which may name files and settings of the server.
        hint: a client's way out, in place of the error's own, which is for a program on this machine; None leaves that.
    """

    status: int
    kind: str
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    shown: bool = True
    hint: str | None = None


_RETRY = {"Retry-After": "1"}
_NO_RETRY = {"x-should-retry": "false"}
"""OpenAI's clients repeat what ended with 429 or 5xx, unless a header says that this is no use."""

_INVALID = "invalid_request_error"
INTERNAL = ErrorShape(500, "server_error", "internal_error", headers=_NO_RETRY, shown=False)
CLOSING = ErrorShape(503, "server_error", "server_closing", headers=_RETRY)

CLOSING_TEXT = "The server is closing; the answer is not complete."

SHAPES: Mapping[type[Exception], ErrorShape] = {
    errors.BadRequest: ErrorShape(400, _INVALID),
    errors.UnknownModel: ErrorShape(404, _INVALID, "model_not_found"),
    errors.UnknownKey: ErrorShape(401, _INVALID, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"}),
    errors.ContextOverflow: ErrorShape(400, _INVALID, "context_length_exceeded"),
    errors.InputError: ErrorShape(400, _INVALID),
    errors.BadSchema: ErrorShape(400, _INVALID, "invalid_schema"),
    errors.ConfigError: ErrorShape(400, _INVALID),  # of the call: settings were checked before the server listened
    errors.BudgetExceeded: ErrorShape(
        429, "insufficient_quota", "insufficient_quota", headers=_NO_RETRY, hint="Who runs the server can allow more."
    ),
    errors.Overloaded: ErrorShape(429, "rate_limit_error", "overloaded", headers=_RETRY, hint="Try again later."),
    errors.AnswerTimeout: ErrorShape(
        504,
        "server_error",
        "timeout",
        headers=_RETRY,
        hint="Ask for a shorter answer (max_tokens), or try again later.",
    ),
    errors.StoreUnavailable: ErrorShape(503, "server_error", "budget_unavailable", headers=_RETRY, shown=False),
    errors.BadStore: ErrorShape(503, "server_error", "budget_unavailable", headers=_NO_RETRY, shown=False),
    errors.ModelServerError: ErrorShape(502, "server_error", "model_unavailable", headers=_RETRY, shown=False),
    errors.ModelServerBusy: ErrorShape(503, "server_error", "model_unavailable", headers=_RETRY, shown=False),
    errors.ModelServerRefused: ErrorShape(502, "server_error", "model_unavailable", headers=_NO_RETRY, shown=False),
    errors.EscalationFailed: ErrorShape(502, "server_error", "llm_unavailable", headers=_RETRY, shown=False),
    errors.EndpointRefused: ErrorShape(502, "server_error", "llm_unavailable", headers=_NO_RETRY, shown=False),
    **dict.fromkeys(
        (
            *(errors.ModelNotFound, errors.UnsafeWeights, errors.AdapterMismatch, errors.TokenizerMismatch),
            *(errors.UnpricedModel, errors.BadLimit, errors.ExposedServer, errors.HoldClosed),
            *(errors.FolderInUse, errors.LedgerError),
        ),
        INTERNAL,
    ),
}
"""By the nearest class in an error's order of bases; everything else is ``INTERNAL``."""


def shape_of(error: BaseException) -> ErrorShape:
    """How an error is told."""
    return next((SHAPES[kind] for kind in type(error).__mro__ if kind in SHAPES), INTERNAL)


def headers_of(error: BaseException) -> dict[str, str]:
    """Headers of an error's response; where the error knows how long to wait, Retry-After says so, in whole seconds."""
    headers, wait_s = dict(shape_of(error).headers), getattr(error, "wait_s", None)
    if "Retry-After" in headers and wait_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(wait_s)))
    return headers


def error_body(error: BaseException, request_id: str) -> dict[str, Any]:
    """OpenAI's JSON of an error; one that is not shown names the request, for the server's log."""
    shape = shape_of(error)
    if shape.shown:
        message = str(error)
        if shape.hint is not None and isinstance(error, errors.S2TError):
            message = f"{message.removesuffix(error.hint).strip()} {shape.hint}"
    else:
        message = f"{HTTPStatus(shape.status).phrase}; the server's log has request {request_id}."
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    return body_of(message, shape.kind, code or shape.code, param)


def body_of(message: str, kind: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's JSON of an error."""
    return {"error": {"message": storable(message), "type": kind, "param": param, "code": code}}


def event_of(body: Mapping[str, Any] | str) -> bytes:
    """A server-sent event with this data."""
    data = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + data.encode() + b"\n\n"
