"""Listening: an address, uvicorn, and limits on clients that send or read slowly."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..chat.chat_model import ChatS2T
from ..endpoints.loopback import is_loopback
from ..errors import ConfigError, ExposedServer
from .app import create_app
from .error_responses import body_of
from .tenants import Tenants

HEADER_BYTES = 16 << 10
HEADER_S = 10.0
"""Seconds until a request's headers have come, from its first byte, or from the connection's beginning."""
IDLE_S = 75
"""Seconds that a connection stays open between requests: an agent's tools take their time."""
UNREAD_S = 60
"""Seconds that a client's system may leave sent bytes unacknowledged or its window shut, where the system can tell."""
SEND_BYTES = 64 << 10
"""Bytes that the system buffers for a client that does not read; more would hide that it has stopped."""
CLOSING_S = 10
"""Seconds that running answers get when the server ends."""
SETTLING_S = 10
"""Seconds that those which it then cancels get to tell their clients, to be recorded, and to settle their budgets."""
AHEAD_BYTES = 1 << 20
"""Bytes of further requests that are read while an answer is computed; only who is read is seen to leave."""
CONNECTIONS = 1024


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol, which also ends connections whose headers, or a refused request's body, never end.

    A client that leaves is noticed whatever it sent before, and malformed HTTP is told in OpenAI's shape.
    """

    def connection_made(self, transport: Any) -> None:
        """Start the clock."""
        super().connection_made(transport)
        self._due: asyncio.TimerHandle | None = None
        self._follow_clock()

    def data_received(self, data: bytes) -> None:
        """Read, and stop or start the clock."""
        super().data_received(data)
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) < AHEAD_BYTES:
            self.flow.resume_reading()
        self._follow_clock()

    def on_response_complete(self) -> None:
        """The next request may take its time to begin."""
        super().on_response_complete()
        self._follow_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        super().connection_lost(exc)
        if self._due is not None:
            self._due.cancel()

    def send_400_response(self, msg: str) -> None:
        """Refuse malformed HTTP; a request that was answered before the rest of it came gets no second response."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(body_of(msg, "invalid_request_error", None)).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            head = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _follow_clock(self) -> None:
        """The clock runs while headers are waited for, or the rest of a body whose request is answered already."""
        theirs = self.conn.their_state
        idle = self.timeout_keep_alive_task is not None  # then uvicorn's own clock runs
        refused = theirs is h11.SEND_BODY and self.conn.our_state is h11.DONE
        waits = refused or (theirs is h11.IDLE and not idle)
        if waits and self._due is None:
            self._due = self.loop.call_later(HEADER_S, self.transport.close)
        elif not waits and self._due is not None:
            self._due.cancel()
            self._due = None


class SettlingServer(uvicorn.Server):
    """uvicorn's server, which waits for the answers that it cancels: the signal that it was sent ends the process.

    Attributes:
        before_signal: called before that signal ends the process, which runs no more code then.
    """

    before_signal: Callable[[], None] | None = None
    _signalled = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Shut down."""
        self._signalled = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close, and wait for what was cancelled."""
        await super().shutdown(sockets)
        if self.server_state.tasks and not self.force_exit:
            await asyncio.wait(list(self.server_state.tasks), timeout=SETTLING_S)
        if self._signalled and self.before_signal is not None:
            self.before_signal()


def check_exposure(host: str, tenants: Tenants) -> None:
    """Refuse to listen to other machines without keys.

    Raises:
        ExposedServer: the address is not a loopback one, and no keys are asked for.
    """
    if not tenants.with_keys and not is_loopback(host):
        raise ExposedServer(
            f"{host!r} is not a loopback address, and everybody there could spend this server's budget.",
            hint="Give --keys FILE (s2t key NAME makes an entry), or listen on 127.0.0.1.",
        )


def listen(host: str, port: int) -> socket.socket:
    """A socket to listen on.

    Raises:
        ConfigError: the address cannot be had.
    """
    try:
        [(family, _, _, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named: else asyncio sets no TCP_NODELAY
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # accepted connections inherit it
                found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_S * 1000)
            found.bind(address)
        except OSError:
            found.close()
            raise
    except (OSError, OverflowError) as error:
        raise ConfigError(f"{host}:{port} cannot be listened on: {error}.", hint="Choose another --port.") from None
    return found


def server_of(app: Starlette) -> SettlingServer:
    """A uvicorn server with this module's limits; run it with ``sockets=[listen(...)]``."""
    return SettlingServer(
        uvicorn.Config(
            app,
            http=BoundedProtocol,
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=HEADER_BYTES,
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=IDLE_S,
            timeout_graceful_shutdown=CLOSING_S,
        )
    )


def serve(
    chat_model: ChatS2T,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    tenants: Tenants | None = None,
    names: Sequence[str] = (),
    trace: bool = False,
    on_loading: Callable[[], None] | None = None,
    on_listening: Callable[[str, int], None] | None = None,
) -> None:
    """Serve until interrupted; running answers get ``CLOSING_S`` to end, then an error event.

    Args:
        chat_model: answers every request; its weights are loaded before the first is taken.
        host: a loopback address, or any other where ``tenants`` have keys.
        port: 0 takes a free one.
        tenants: who may ask.
        names: what clients may call the model.
        trace: show the ledger at ``/trace``, to whoever may ask.
        on_loading: called before the weights are loaded, once all else is known to work.
        on_listening: called with host and port once the weights are loaded and clients can connect.

    Raises:
        ExposedServer: another address than a loopback one, without keys.
        ConfigError: an address that cannot be had, or as ``create_app``.
    """
    tenants = Tenants() if tenants is None else tenants
    check_exposure(host, tenants)
    with listen(host, port) as bound:
        if on_loading is not None:
            on_loading()
        app = create_app(chat_model, tenants=tenants, names=names, trace=trace)
        bound.listen()
        if on_listening is not None:
            on_listening(*bound.getsockname()[:2])
        server = server_of(app)
        if chat_model.ledger is not None:
            server.before_signal = chat_model.ledger.close  # else its last records stay in a file beside it
        server.run(sockets=[bound])
