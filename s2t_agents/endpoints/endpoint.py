"""One HTTP endpoint: pooled connections, bounded response bodies, no key in any error."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import httpx
from pydantic import SecretStr

from ..errors import ConfigError, EndpointDown, EndpointRefused, EscalationFailed
from .api_keys import check_key, redact, redact_in_logs
from .connections import Connections
from .loopback import is_loopback
from .statuses import retry_after, status_error
from .urls import checked_url

MAX_BODY_BYTES = 1 << 20
"""Maximum size of a response body in bytes; one with K log-probabilities has a few thousand."""
KEEP_ALIVE_S = 4.0
"""Shorter than the 5 s after which common servers close idle connections, so a closed one is never reused."""
MAX_SECONDS = 3600
"""Longest time limit."""
MAX_SHOWN_CHARS = 200
"""Characters of a server's error message that are shown."""


@dataclass(frozen=True)
class Access:
    """How a server is connected to.

    Attributes:
        api_key: sent as a bearer token; never shown, and not pickled.
        api_key_env: name of the environment variable with the key instead; is pickled.
        allow_http: permit plain HTTP to other machines.
        verify: as in httpx: True, or an ``ssl.SSLContext``.
        connect_s: seconds for one connection, TLS included.
    """

    api_key: SecretStr | str | None = field(default=None, repr=False)
    api_key_env: str | None = None
    allow_http: bool = False
    verify: Any = True
    connect_s: float = 5.0

    def __post_init__(self) -> None:
        """Check the limit (ConfigError)."""
        check_seconds(connect_s=self.connect_s)


def check_seconds(**limits: float) -> None:
    """Refuse time limits that are none (ConfigError)."""
    for name, value in limits.items():
        if not 0 < value <= MAX_SECONDS:
            raise ConfigError(f"{name} is {value}; it must lie above 0 and at most at {MAX_SECONDS} seconds.")


class Endpoint:
    """A server's URL, API key and connection pool. Its coroutines run only on ``event_loop.shared_loop``.

    Args:
        base_url: up to and including the version, as ``https://host/v1``.
        access: how it is connected to.

    Raises:
        ConfigError: an invalid URL, plain HTTP to another machine, or a key that is not valid in a header.
    """

    def __init__(self, base_url: str, access: Access) -> None:
        self.url = checked_url(base_url, allow_http=access.allow_http)
        self._key = SecretStr(access.api_key) if isinstance(access.api_key, str) else access.api_key
        self._key_env = access.api_key_env
        if self._key is not None:
            check_key(self._key.get_secret_value())
        self._connect_s, self._verify = access.connect_s, access.verify
        self._tls: ssl.SSLContext | None = None
        self._connections = Connections()

    def __repr__(self) -> str:
        return f"Endpoint({self.display_url!r})"

    @property
    def display_url(self) -> str:
        """The URL for display; a path other than ``/v1``, which may contain a key, is shown as its hash."""
        path = self.url.path
        if path not in ("/", "/v1/"):
            path = f"/{hashlib.sha256(path.encode()).hexdigest()[:8]}/"
        return str(self.url.copy_with(path=path))

    @property
    def root(self) -> httpx.URL:
        """The URL without the version, for endpoints outside OpenAI's API."""
        return self.url.copy_with(path=self.url.path.rstrip("/").removesuffix("/v1") or "/")

    async def post(
        self,
        url: httpx.URL | str,
        body: object,
        *,
        sent: Callable[[], None] = lambda: None,
        most_bytes: int = MAX_BODY_BYTES,
    ) -> bytes:
        """Send a JSON request; returns the response body.

        Args:
            url: absolute, or relative to the base.
            body: sent as JSON.
            sent: called when the body begins to be sent: from then on the server may work, and bill.
            most_bytes: of the response.

        Raises:
            ConfigError: certificates or proxies of the environment that cannot be used.
            EndpointDown, EndpointBusy: no connection, or 429 and 5xx; nothing was spent.
            EndpointRefused, QuestionRefused: any other status than 200, or no key; nothing was spent.
            EscalationFailed: no readable response.
        """
        return await self._request("POST", url, sent, most_bytes, json=body)

    async def get(self, url: httpx.URL | str) -> bytes:
        """The response body of a GET request; errors as ``post``."""
        return await self._request("GET", url, lambda: None, MAX_BODY_BYTES)

    async def close(self) -> None:
        """Close idle connections."""
        await self._connections.close()

    async def lines(
        self, url: httpx.URL | str, body: object, *, sent: Callable[[], None] = lambda: None
    ) -> AsyncGenerator[bytes, None]:
        """The lines of a streamed response, as they arrive; arguments and errors as ``post``.

        The whole may be of any length, a line has at most ``MAX_BODY_BYTES``.
        """
        fault: EscalationFailed
        try:
            async with self._stream("POST", url, sent, json=body) as response:
                if response.status_code == 200:
                    async with aclosing(_lines(response)) as lines:
                        async for line in lines:
                            yield line
                    return
                fault = self._status_error(response, await _read_body(response))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            fault = self._broken(error)
        raise fault  # as in _request

    async def _request(
        self, method: str, url: httpx.URL | str, sent: Callable[[], None], most_bytes: int, **body: Any
    ) -> bytes:
        fault: EscalationFailed
        try:
            async with self._stream(method, url, sent, **body) as response:
                content = await _read_body(response, most_bytes)
            if response.status_code == 200:
                return content
            fault = self._status_error(response, content)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            fault = self._broken(error)
        raise fault  # raised outside the handlers: no exception chain, since httpx's errors may contain the key

    def _stream(
        self, method: str, url: httpx.URL | str, sent: Callable[[], None], **body: Any
    ) -> contextlib.AbstractAsyncContextManager[httpx.Response]:
        where, headers, trace = self.url.join(url), self._headers(), _trace_body_start(sent)
        return self._connections.request(self._new_client, method, where, trace=trace, headers=headers, **body)

    def _broken(self, error: httpx.HTTPError | httpx.InvalidURL) -> EscalationFailed:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.UnsupportedProtocol):
            return EndpointDown(f"{self.url.host} cannot be reached: {self._error_text(error)}.")
        return EscalationFailed(f"{self.url.host} broke off: {self._error_text(error)}.")

    def _new_client(self) -> httpx.AsyncClient:
        problem, here = "", is_loopback(self.url.host)
        try:
            if self._tls is None:  # once: 18 ms
                self._tls = httpx.create_ssl_context(self._verify, trust_env=not here)
            return httpx.AsyncClient(
                timeout=httpx.Timeout(None, connect=self._connect_s),  # the caller's deadline covers the rest
                limits=httpx.Limits(max_connections=None, keepalive_expiry=KEEP_ALIVE_S),
                verify=self._tls,
                trust_env=not here,  # no proxy for loopback addresses
                follow_redirects=False,  # the key must only go to its host
            )
        except (OSError, ImportError, TypeError) as error:
            problem = self._error_text(error)
        except (ValueError, httpx.InvalidURL) as error:
            problem = f"a proxy's URL cannot be used ({type(error).__name__})"  # the message may contain the password
        raise ConfigError(
            f"no connection to {self.url.host} can be set up: {problem}.",
            hint="Check verify, and SSL_CERT_FILE, SSL_CERT_DIR and the proxy variables of the environment.",
        )

    def _headers(self) -> dict[str, str]:
        headers = {"Accept-Encoding": "identity"}  # no compression, so that MAX_BODY_BYTES limits the content too
        key = self._secret()
        return {**headers, "Authorization": f"Bearer {key}"} if key else headers

    def _secret(self) -> str:
        if self._key is not None:
            key = self._key.get_secret_value()
        elif self._key_env is None:
            return ""
        else:
            key = os.environ.get(self._key_env, "")
            if not key:
                raise EndpointRefused(f"the environment variable {self._key_env} holds no API key.")
            check_key(key)
        redact_in_logs(key)
        return key

    def redacted(self, text: str) -> str:
        """A text from the server with the key redacted; whole, since half a key is not found."""
        key = self._secret()
        return redact(text, [key]) if key else text

    def _error_text(self, error: Exception) -> str:
        return self.redacted(str(error) or type(error).__name__).rstrip(".")

    def _status_error(self, response: httpx.Response, content: bytes) -> EscalationFailed:
        message = self.redacted(_error_message(content)) or self.redacted(response.reason_phrase)
        message = f"{self.url.host} answered {response.status_code}: {' '.join(message.split())[:MAX_SHOWN_CHARS]}."
        return status_error(response.status_code, message, retry_after(response.headers.get("retry-after")))

    def __getstate__(self) -> dict[str, Any]:
        """State without the key and the connections."""
        return {**self.__dict__, "_key": None, "_tls": None, "_connections": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._connections = Connections()


def _trace_body_start(sent: Callable[[], None]) -> Callable[[str, Any], Awaitable[None]]:
    async def trace(event: str, info: Any) -> None:
        if event.endswith("send_request_body.started"):
            sent()

    return trace


async def _read_body(response: httpx.Response, most_bytes: int = MAX_BODY_BYTES) -> bytes:
    content = bytearray()
    async for part in _parts(response):
        content += part
        _check_length(content, most_bytes)
    return bytes(content)


async def _lines(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    line = bytearray()
    async with aclosing(_parts(response)) as parts:
        async for part in parts:
            *complete, rest = part.split(b"\n")
            for each in complete:
                yield bytes(line + each)
                line.clear()
            line += rest
            _check_length(line)
    if line:
        yield bytes(line)


async def _parts(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    if response.headers.get("content-encoding", "identity") != "identity":
        raise EscalationFailed("the answer is compressed, although that was not asked for.")
    async for part in response.aiter_raw():
        yield part


def _check_length(content: bytearray, most_bytes: int = MAX_BODY_BYTES) -> None:
    if len(content) > most_bytes:
        raise EscalationFailed(f"the answer is longer than {most_bytes} bytes.")


def _error_message(content: bytes) -> str:
    """The message in an error body, in OpenAI's form or another one."""
    text = content.decode(errors="replace")
    try:
        error = json.loads(text)
        error = error.get("error", error) if isinstance(error, dict) else error
        text = str(error.get("message", error)) if isinstance(error, dict) else str(error)
    except (ValueError, RecursionError):
        pass
    return text
