"""URLs of servers, as given by a user: checked without being repeated, since any part may be a key."""

from __future__ import annotations

import contextlib

import httpx

from ..errors import ConfigError
from .loopback import is_loopback

URL_HINT = "It looks like https://host/v1; give the key as api_key."


def checked_url(base_url: str, *, allow_http: bool) -> httpx.URL:
    """Validate a server's URL; returns it with a trailing slash.

    Raises:
        ConfigError: not an http(s) URL, one that may contain a secret, or plain HTTP to another machine. The message
            does not show the URL, since any part of a malformed one may be a key.
    """
    url: httpx.URL | None = None
    with contextlib.suppress(httpx.InvalidURL, TypeError, ValueError):
        url = httpx.URL(base_url)
        str(url.copy_with(path="/"))
    if url is None:
        raise ConfigError("the server's URL cannot be read.", hint=URL_HINT)
    if url.userinfo or url.query or url.fragment or "@" in base_url or "?" in base_url or "#" in base_url:
        raise ConfigError("the server's URL carries a user, a query or a fragment.", hint=URL_HINT)
    if url.scheme not in ("http", "https") or not url.host or not 0 < (url.port or 443) < 65536:
        raise ConfigError("the server's URL is no http(s) URL.", hint=URL_HINT)
    if url.scheme == "http" and not is_loopback(url.host) and not allow_http:
        raise ConfigError(
            "plain http to another machine would send prompts and the key in the clear.",
            hint="Use https, or say allow_http=True in a network that you trust.",
        )
    return url.copy_with(path=url.path.rstrip("/") + "/")
