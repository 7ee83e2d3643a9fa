"""Connections to one server, kept open between requests, whatever becomes of a request.

A cancelled request (its caller left, its time was over) may leave its connection in httpcore's pool for ever, neither
closed nor idle: where a coroutine of the pool's must not be cancelled it is shielded against anyio's cancellation, not
against asyncio's. When all places are lost, every further request waits for one, without end. So a pool takes no
further requests once one was cancelled that had not given its connection back, and is closed after its last one. And
requests wait for a place before they come to a pool: in one that loses a place there is nobody who waits for it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx

MOST = 64
"""Connections to one server at a time."""
GIVEN_BACK = "response_closed.complete"
"""httpcore's trace event of a connection that is idle again, or closed."""

NewPool = Callable[[], httpx.AsyncClient]
Trace = Callable[[str, Any], Awaitable[None]]


class Connections:
    """The pool of one server's connections; in one event loop at a time, that of a forked child being another."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._free: asyncio.Semaphore | None = None
        self._pool: httpx.AsyncClient | None = None
        self._requests: Counter[httpx.AsyncClient] = Counter()
        self._closing: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def request(
        self, new_pool: NewPool, method: str, url: httpx.URL, *, trace: Trace, **content: Any
    ) -> AsyncIterator[httpx.Response]:
        """A request and its streamed response.

        Args:
            new_pool: makes a pool where there is none.
            method: of HTTP.
            url: absolute.
            trace: httpcore's trace function.
            content: headers and body, as of ``httpx.AsyncClient.stream``.

        Raises:
            Exception: what ``new_pool`` raises.
            httpx.HTTPError, httpx.InvalidURL: as httpx.
        """
        async with self._places():
            pool = self._current(new_pool)
            given_back = False

            async def traced(event: str, info: Any) -> None:
                nonlocal given_back
                given_back = given_back or event.endswith(GIVEN_BACK)
                await trace(event, info)

            self._requests[pool] += 1
            try:
                async with pool.stream(method, url, extensions={"trace": traced}, **content) as response:
                    yield response
            except asyncio.CancelledError:
                if not given_back and pool is self._pool:
                    self._pool = None
                raise
            finally:
                self._requests[pool] -= 1
                self._close_if_left(pool)

    async def close(self) -> None:
        """Close idle connections, and those under way after their requests."""
        pool, self._pool = self._pool, None
        if pool is not None and self._loop is asyncio.get_running_loop():
            self._close_if_left(pool)
            await asyncio.gather(*self._closing)

    def _places(self) -> asyncio.Semaphore:
        loop = asyncio.get_running_loop()
        if self._free is None or self._loop is not loop:
            self._loop, self._pool, self._free = loop, None, asyncio.Semaphore(MOST)
            self._requests, self._closing = Counter(), set()
        return self._free

    def _current(self, new_pool: NewPool) -> httpx.AsyncClient:
        if self._pool is None:
            self._pool = new_pool()
        return self._pool

    def _close_if_left(self, pool: httpx.AsyncClient) -> None:
        if pool is self._pool or self._requests[pool]:
            return
        del self._requests[pool]
        closing = asyncio.create_task(pool.aclose())  # of its own, which nobody cancels
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
