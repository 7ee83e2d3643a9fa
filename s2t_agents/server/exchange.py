"""One request's work beside its client: it ends when the client leaves, and no stream ends without saying how. All
streams of server-sent events (SSE), chat's and plain completions', go through ``EventStream``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from ..redaction import one_line
from .error_responses import CLOSING, CLOSING_TEXT, INTERNAL, body_of, error_body, event_of, shape_of

T = TypeVar("T")

_log = logging.getLogger(__name__)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The outcome of the work; it is cancelled, and has ended when this returns, if the client leaves first.

    Args:
        receive: of a request whose body was read.
        work: cancelling it stops a generation within a step.

    Raises:
        ClientDisconnect: the client left.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        watch.cancel()
        await _end(task)


async def _end(task: asyncio.Future[Any]) -> None:
    """Cancel a task and wait for its end, through further cancellations of this one."""
    cancelled: asyncio.CancelledError | None = None
    if not task.done():
        task.cancel()
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError as again:
            cancelled = again
    if not task.cancelled():
        task.exception()  # retrieved, so that it is not reported as never retrieved
    if cancelled is not None:
        raise cancelled


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """A response of server-sent events.

    What fails before the first event is raised, so that it gets a status of its own. What fails later becomes an
    error event, after which no ``[DONE]`` comes.

    Args:
        open_events: begins the generation.
        request_id: of the request.
        send_s: seconds that the client may leave the connection full before it counts as gone.
    """

    def __init__(self, open_events: Callable[[], AsyncIterator[bytes]], request_id: str, *, send_s: float) -> None:
        self._open_events, self._request_id, self._send_s = open_events, request_id, send_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application of this response."""
        await while_connected(receive, self._send_events(send))

    async def _send_events(self, send: Send) -> None:
        begun = False

        async def put(data: bytes, *, more: bool = True) -> None:
            message = {"type": "http.response.body", "body": data, "more_body": more}
            await _within(self._send_s, send(message))

        try:
            async with aclosing(self._open_events()) as events:  # type: ignore[type-var]
                async for event in events:
                    if not begun:
                        begun = True
                        await send({"type": "http.response.start", "status": 200, "headers": self._headers()})
                    await put(event)
            await put(b"", more=False)
        except (Exception, asyncio.CancelledError) as error:
            if not begun or isinstance(error, ClientDisconnect):
                raise
            if isinstance(error, asyncio.CancelledError):  # the server closes, or the client has left and reads nothing
                body = body_of(CLOSING_TEXT, CLOSING.kind, CLOSING.code)
            else:
                body = error_body(error, self._request_id)
                log_error(error, self._request_id)
            with suppress(ClientDisconnect):
                await put(event_of(body), more=False)
            if isinstance(error, asyncio.CancelledError):
                raise

    def _headers(self) -> list[tuple[bytes, bytes]]:
        return [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]


async def _within(seconds: float, sending: Awaitable[None]) -> None:
    try:
        async with asyncio.timeout(seconds):
            await sending
    except TimeoutError:
        raise ClientDisconnect from None


def log_error(error: BaseException, request_id: str) -> None:
    """Log what the client does not see: unexpected errors with their place, ours in a line."""
    shape = shape_of(error)
    if shape.shown:
        _log.debug("request %s: %s", request_id, one_line(str(error)))
    else:
        _log.error("request %s: %s", request_id, one_line(str(error)), exc_info=error if shape is INTERNAL else None)
