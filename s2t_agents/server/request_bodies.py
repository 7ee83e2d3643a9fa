"""Bodies of requests: JSON within limits of size, depth and time."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from ..errors import BadRequest

_DRAINED_S = 2.0
_LARGE = 64 << 10
"""Bytes of a body from which it is read beside the event loop."""


@dataclass(frozen=True)
class BodyLimits:
    """Limits of one request's body. Depth is limited by the JSON parser, to 200.

    Attributes:
        size: bytes.
        seconds: until it has come.
        brackets: that open lists and objects, those in texts too: millions of empty lists are small and slow to make.
    """

    size: int = 4 << 20
    seconds: float = 30.0
    brackets: int = 200_000


async def json_object(request: Request, limits: BodyLimits) -> dict[str, Any]:
    """The request's body, a JSON object.

    Raises:
        BadRequest: it is none, holds an infinite number, or more lists and objects than the limit.
        HTTPException: 408 too slow, 413 too large, 415 not declared as JSON (which also keeps other web pages from
            posting it out of a browser), or compressed.
        ClientDisconnect: the client left.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise HTTPException(415, f"Content-Type is {media!r:.80}; send application/json.")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise HTTPException(415, "The body is compressed; send it as it is.")
    body = await _body(request, limits)
    if body.count(b"[") + body.count(b"{") > limits.brackets:
        raise BadRequest(f"The body has more than {limits.brackets:,} opening brackets.", param=None, hint="Send less.")
    return await asyncio.to_thread(_parsed, body) if len(body) > _LARGE else _parsed(body)


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        found = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise BadRequest(f"The body is no JSON: {error}.", param=None) from None
    if not isinstance(found, dict):
        raise BadRequest("The body is no JSON object.", param=None)
    if _holds_infinity(found):
        raise BadRequest("The body holds a number beyond all floating-point numbers.", param=None)
    return found


async def _body(request: Request, limits: BodyLimits) -> bytes:
    too_large = HTTPException(413, f"The body has more than {limits.size:,} bytes.", _CLOSE)
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > limits.size:
        await _drain(request, limits.size)
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.seconds):
            async for part in request.stream():
                body += part
                if len(body) > limits.size:
                    break
    except TimeoutError:
        raise HTTPException(408, f"The body did not come within {limits.seconds:g} seconds.", _CLOSE) from None
    if len(body) > limits.size:
        await _drain(request, limits.size)
        raise too_large
    return bytes(body)


_CLOSE = {"Connection": "close"}


async def _drain(request: Request, size: int) -> None:
    """Read on for a moment: a client that still sends reads no response, and a closed connection loses it."""
    left = 4 * size
    try:
        async with asyncio.timeout(_DRAINED_S):
            while left > 0:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                left -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def _holds_infinity(value: Any) -> bool:
    """Whether a number was too large for a float; in time that grows with the size alone, at any depth."""
    unseen = [value]
    while unseen:
        here = unseen.pop()
        if isinstance(here, dict):
            unseen.extend(here.values())
        elif isinstance(here, list):
            unseen.extend(here)
        elif isinstance(here, float) and math.isinf(here):
            return True
    return False
