"""One HTTP endpoint: pooled connections, a secret that stays one, bodies of bounded size."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import hashlib
import ipaddress
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import httpx
from pydantic import SecretStr

from ..errors import ConfigError, EndpointBusy, EndpointDown, EndpointRefused, EscalationFailed, QuestionRefused

MAX_BODY = 1 << 20
"""Bytes of an answer that are read at most; one with K log-probabilities has a few thousand."""
CONNECTIONS = 64
KEEP_ALIVE_S = 4.0
"""Shorter than the 5 s after which common servers close an idle connection: the race for it is never run."""
BUSY = frozenset({408, 425, 429, 500, 502, 503, 504, 529})
ABOUT_THE_QUESTION = frozenset({400, 413, 422})
"""Statuses that speak of the request alone: too long a prompt, say."""
FORM = "It looks like https://host/v1; give the key as api_key."
HIDDEN = "***"
LOGGERS = (
    *("httpx", "httpcore.connection", "httpcore.http11", "httpcore.http2", "httpcore.proxy", "httpcore.socks"),
    "asyncio",
)
"""Those that write down requests, and what servers say in reason phrases and headers."""
SHOWN = 200
"""Characters of a server's complaint that are passed on."""


class Endpoint:
    """Where a server is and how it is spoken to. Coroutines here run on ``background.running_loop`` alone.

    Args:
        base_url: up to and including the version, as ``https://host/v1``.
        api_key: sent as a bearer token; never shown, and not part of a pickle.
        api_key_env: the environment variable that holds it instead; this travels in a pickle.
        connect_s: seconds for one connection, TLS included.
        allow_http: permit plain HTTP to other machines.
        verify: as httpx takes it: True, or an ``ssl.SSLContext``.

    Raises:
        ConfigError: no usable URL, plain HTTP to another machine, or a key that no header can carry.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: SecretStr | str | None,
        api_key_env: str | None,
        connect_s: float,
        allow_http: bool,
        verify: Any,
    ) -> None:
        self.url = checked_url(base_url, allow_http=allow_http)
        self._key = SecretStr(api_key) if isinstance(api_key, str) else api_key
        self._env = api_key_env
        if self._key is not None:
            _check_key(self._key.get_secret_value())
        self._connect_s, self._verify = connect_s, verify
        self._client: httpx.AsyncClient | None = None
        self._home: asyncio.AbstractEventLoop | None = None

    def __repr__(self) -> str:
        return f"Endpoint({self.shown!r})"

    @property
    def shown(self) -> str:
        """Where it is, for people: a path other than ``/v1``, which may hold a key, as its hash."""
        path = self.url.path
        if path not in ("/", "/v1/"):
            path = f"/{hashlib.sha256(path.encode()).hexdigest()[:8]}/"
        return str(self.url.copy_with(path=path))

    @property
    def root(self) -> httpx.URL:
        """The URL without its version: where servers keep what OpenAI's API has no name for."""
        return self.url.copy_with(path=self.url.path.rstrip("/").removesuffix("/v1") or "/")

    async def post(self, url: httpx.URL | str, body: object, *, sent: Callable[[], None] = lambda: None) -> bytes:
        """The body of the answer to a JSON request.

        Args:
            url: absolute, or relative to the base.
            body: as JSON.
            sent: called when the body begins to leave: from here on the server may work, and bill.

        Raises:
            ConfigError: certificates or proxies of the environment that cannot be used.
            EndpointDown, EndpointBusy: as their names say; nothing was spent.
            EndpointRefused, QuestionRefused: any other answer than 200; nothing was spent.
            EscalationFailed: none that could be read.
        """
        return await self._request("POST", url, sent, json=body)

    async def get(self, url: httpx.URL | str) -> bytes:
        """The body of a page; errors as ``post``."""
        return await self._request("GET", url, lambda: None)

    async def close(self) -> None:
        """Close idle connections."""
        client, self._client = self._client, None
        if client is not None and self._home is asyncio.get_running_loop():
            await client.aclose()

    async def _request(self, method: str, url: httpx.URL | str, sent: Callable[[], None], **body: Any) -> bytes:
        where = self.url.join(url)
        fault: EscalationFailed
        try:
            async with self._pool().stream(
                method, where, headers=self._headers(), extensions={"trace": _on_body(sent)}, **body
            ) as response:
                content = await _read(response)
            if response.status_code == 200:
                return content
            fault = self._declined(response, content)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol) as error:
            fault = EndpointDown(f"{self.url.host} cannot be reached: {self.hidden(_said(error))}.")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            fault = EscalationFailed(f"{self.url.host} broke off: {self.hidden(_said(error))}.")
        raise fault  # out here it carries no chain: what httpx says and holds may have the key in it

    def _pool(self) -> httpx.AsyncClient:
        home = asyncio.get_running_loop()
        if self._client is None or self._home is not home:  # also in a forked child
            self._home = home
            self._client = self._new_client()
        return self._client

    def _new_client(self) -> httpx.AsyncClient:
        problem = ""
        try:
            return httpx.AsyncClient(
                timeout=httpx.Timeout(None, connect=self._connect_s),  # the rest is under the caller's deadline
                limits=httpx.Limits(max_connections=CONNECTIONS, keepalive_expiry=KEEP_ALIVE_S),
                verify=self._verify,
                trust_env=not _is_loopback(self.url.host),  # no proxy stands between this machine and itself
                follow_redirects=False,  # a key goes to the host it was given for
            )
        except (OSError, ImportError, TypeError) as error:
            problem = self.hidden(_said(error))
        except (ValueError, httpx.InvalidURL) as error:
            problem = f"a proxy's URL cannot be used ({type(error).__name__})"  # no more: it may quote the password
        raise ConfigError(
            f"no connection to {self.url.host} can be set up: {problem}.",
            hint="Check verify, and SSL_CERT_FILE, SSL_CERT_DIR and the proxy variables of the environment.",
        )

    def _headers(self) -> dict[str, str]:
        headers = {"Accept-Encoding": "identity"}  # what is read is what was sent: no body can unfold
        key = self._secret()
        return {**headers, "Authorization": f"Bearer {key}"} if key else headers

    def _secret(self) -> str:
        if self._key is not None:
            key = self._key.get_secret_value()
        elif self._env is None:
            return ""
        else:
            key = os.environ.get(self._env, "")
            if not key:
                raise EscalationFailed(f"the environment variable {self._env} holds no API key.")
            _check_key(key)
        hide_in_logs(key)
        return key

    def hidden(self, text: str) -> str:
        """A text of the server's without the key."""
        key = self._secret()
        return without(text, spellings(key)) if key else text

    def _declined(self, response: httpx.Response, content: bytes) -> EscalationFailed:
        said = self.hidden(_complaint(content)) or self.hidden(response.reason_phrase)
        message = f"{self.url.host} answered {response.status_code}: {' '.join(said.split())[:SHOWN]}."
        if response.status_code in BUSY:
            return EndpointBusy(message, wait_s=retry_after(response.headers.get("retry-after")))
        return refused(response.status_code, message)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the key and the connections."""
        return {**self.__dict__, "_key": None, "_client": None, "_home": None}


def checked_url(base_url: str, *, allow_http: bool) -> httpx.URL:
    """A server's URL, with a slash at its end.

    Raises:
        ConfigError: no http(s) URL, one that may carry a secret, or plain HTTP to another machine. No part of it is
            repeated: where it is malformed any of them may be a key.
    """
    url: httpx.URL | None = None
    with contextlib.suppress(httpx.InvalidURL, TypeError, ValueError):
        url = httpx.URL(base_url)
        str(url.copy_with(path="/"))
    if url is None:
        raise ConfigError("the server's URL cannot be read.", hint=FORM)
    if url.userinfo or url.query or url.fragment or "@" in base_url or "?" in base_url or "#" in base_url:
        raise ConfigError("the server's URL carries a user, a query or a fragment.", hint=FORM)
    if url.scheme not in ("http", "https") or not url.host or not 0 < (url.port or 443) < 65536:
        raise ConfigError("the server's URL is no http(s) URL.", hint=FORM)
    if url.scheme == "http" and not _is_loopback(url.host) and not allow_http:
        raise ConfigError(
            "plain http to another machine would send prompts and the key in the clear.",
            hint="Take https, or say allow_http=True in a network that you trust.",
        )
    return url.copy_with(path=url.path.rstrip("/") + "/")


class _Hiding(logging.Filter):
    """Takes keys out of what other packages log."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: frozenset[str] = frozenset()

    def filter(self, record: logging.LogRecord) -> bool:
        """Let everything pass, without the keys."""
        text = record.getMessage()
        if (hidden := without(text, self.keys)) != text:
            record.msg, record.args = hidden, ()
        return True


_hiding = _Hiding()


def spellings(key: str) -> frozenset[str]:
    """A key as it is, and as it stands in a repr or in JSON."""
    escaped = repr(key)[1:-1]
    return frozenset({key, escaped, escaped.replace("'", "\\'"), json.dumps(key)[1:-1]})


def without(text: str, keys: Iterable[str]) -> str:
    """A text with every key taken out, the longest first: one may be a part of another."""
    for key in sorted(keys, key=len, reverse=True):
        text = text.replace(key, HIDDEN)
    return text


def hide_in_logs(key: str) -> None:
    """From here on a key is shown in no log of the HTTP packages, at any level."""
    if key not in _hiding.keys:
        _hiding.keys |= spellings(key)
        for name in LOGGERS:
            logging.getLogger(name).addFilter(_hiding)  # once, however often it is said


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_key(key: str) -> None:
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError("the API key is empty or holds blanks, line breaks or other than ASCII characters.")


def _on_body(sent: Callable[[], None]) -> Callable[[str, Any], Awaitable[None]]:
    async def trace(event: str, info: Any) -> None:
        if event.endswith("send_request_body.started"):
            sent()

    return trace


async def _read(response: httpx.Response) -> bytes:
    if response.headers.get("content-encoding", "identity") != "identity":
        raise EscalationFailed("the answer is compressed, although that was not asked for.")
    content = bytearray()
    async for part in response.aiter_raw():
        content += part
        if len(content) > MAX_BODY:
            raise EscalationFailed(f"the answer is longer than {MAX_BODY} bytes.")
    return bytes(content)


def refused(status: int, message: str) -> EndpointRefused:
    """What a status means that neither answers nor asks for patience."""
    return QuestionRefused(message) if status in ABOUT_THE_QUESTION else EndpointRefused(message)


def _complaint(content: bytes) -> str:
    """The message in an error body, in OpenAI's form or any other."""
    text = content[:4096].decode(errors="replace")
    try:
        error = json.loads(text)
        error = error.get("error", error) if isinstance(error, dict) else error
        text = str(error.get("message", error)) if isinstance(error, dict) else str(error)
    except (ValueError, RecursionError):
        pass
    return text


def retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header: a number of seconds or an HTTP date; None when it says nothing usable."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return min(float(value), 3600.0)
    try:
        at = email.utils.parsedate_to_datetime(value).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(0.0, at - time.time()), 3600.0)


def _said(error: Exception) -> str:
    return (str(error) or type(error).__name__).rstrip(".")
