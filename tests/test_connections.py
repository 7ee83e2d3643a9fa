"""The connections to a server: whenever a request is cancelled, the next one finds a connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from s2t_agents.endpoints import connections, event_loop
from s2t_agents.endpoints.endpoint import Access, Endpoint

Request = Callable[[Endpoint], Coroutine[Any, Any, None]]
LINES = [b"data: 1\n\n", b"data: 2\n\n", b"data: [DONE]\n\n", b""]
MOMENTS = 60
"""Turns of the event loop that a request takes at most, and some more."""


class Server:
    """Streams four chunks, a turn of the event loop apart; in the caller's event loop."""

    def __init__(self) -> None:
        self.connections = 0
        self.open: set[asyncio.Task[Any] | None] = set()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open.add(task := asyncio.current_task())
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]))
                writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                for data in LINES:
                    writer.write(b"%x\r\n%s\r\n" % (len(data), data))
                    await writer.drain()
                    await asyncio.sleep(0)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open.discard(task)
            writer.close()


@asynccontextmanager
async def asked() -> AsyncIterator[tuple[Endpoint, Server]]:
    handler = Server()
    async with await asyncio.start_server(handler, "127.0.0.1", 0) as listening:
        url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1"
        endpoint = Endpoint(url, Access())
        yield endpoint, handler
        await endpoint.close()
        async with asyncio.timeout(5):
            while handler.open:
                await asyncio.sleep(0.01)


async def stream(endpoint: Endpoint) -> None:
    async with aclosing(endpoint.lines("completions", {})) as lines:
        async for line in lines:
            if b"DONE" in line:
                break


async def post(endpoint: Endpoint) -> None:
    await endpoint.post("completions", {})


async def cancelled(request: Coroutine[Any, Any, None], turns: int) -> None:
    """Cancel a request after so many turns of the event loop."""
    task = asyncio.create_task(request)
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("request_", [stream, post])
def test_whenever_requests_are_cancelled_the_next_one_is_answered(
    request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MOST", 1)

    async def run() -> None:
        async with asked() as (endpoint, _):
            for turns in range(MOMENTS):
                await cancelled(request_(endpoint), turns)
                async with asyncio.timeout(5):
                    await request_(endpoint)

    event_loop.run_coroutine(run(), 60)


@pytest.mark.parametrize("request_", [stream, post])
def test_cancelled_requests_that_wait_for_a_connection_leave_it_to_others(
    request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MOST", 2)

    async def run() -> None:
        async with asked() as (endpoint, _):
            for turns in range(MOMENTS):
                beside = [asyncio.create_task(request_(endpoint)) for _ in range(3)]
                await asyncio.gather(*(cancelled(request_(endpoint), turns) for _ in range(3)))
                async with asyncio.timeout(5):
                    await asyncio.gather(*beside)

    event_loop.run_coroutine(run(), 60)


def test_without_cancellations_one_connection_serves_all_requests() -> None:
    async def run() -> int:
        async with asked() as (endpoint, server):
            for _ in range(10):
                await post(endpoint)
            return server.connections

    assert event_loop.run_coroutine(run(), 30) == 1


def test_hanging_up_on_a_stream_keeps_the_idle_connections() -> None:
    async def run() -> int:
        async with asked() as (endpoint, server):
            await asyncio.gather(post(endpoint), post(endpoint))  # two idle ones
            async with aclosing(endpoint.lines("completions", {})) as lines:
                await anext(lines)
            await asyncio.gather(post(endpoint))
            return server.connections

    assert event_loop.run_coroutine(run(), 30) == 2


def test_a_closed_endpoint_lets_a_request_end_and_takes_new_ones() -> None:
    async def run() -> list[bytes]:
        async with asked() as (endpoint, _):
            async with aclosing(endpoint.lines("completions", {})) as lines:
                first = await anext(lines)
                await endpoint.close()
                rest = [line async for line in lines]
            await post(endpoint)
            return [first, *rest]

    lines = event_loop.run_coroutine(run(), 30)
    assert [line for line in lines if line] == [b"data: 1", b"data: 2", b"data: [DONE]"]
