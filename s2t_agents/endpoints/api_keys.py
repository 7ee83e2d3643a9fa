"""API keys: what a header can carry, and their redaction in texts and logs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable

from ..errors import ConfigError

REDACTED = "***"
HTTP_LOGGERS = (
    *("httpx", "httpcore.connection", "httpcore.http11", "httpcore.http2", "httpcore.proxy", "httpcore.socks"),
    "asyncio",
)
"""Loggers of requests and of servers' reason phrases and headers."""


class _KeyFilter(logging.Filter):
    """Redacts keys in log records of other packages."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: frozenset[str] = frozenset()

    def filter(self, record: logging.LogRecord) -> bool:
        """Redact the keys; drops no record."""
        text = record.getMessage()
        if (hidden := redact(text, self.keys)) != text:
            record.msg, record.args = hidden, ()
        return True


_key_filter = _KeyFilter()


def key_spellings(key: str) -> frozenset[str]:
    """A key verbatim, and as escaped in a repr or in JSON."""
    escaped = repr(key)[1:-1]
    return frozenset({key, escaped, escaped.replace("'", "\\'"), json.dumps(key)[1:-1]})


def redact(text: str, keys: Iterable[str]) -> str:
    """A text with every key redacted, the longest first, since one may be part of another."""
    for key in sorted(keys, key=len, reverse=True):
        text = text.replace(key, REDACTED)
    return text


def redact_in_logs(key: str) -> None:
    """Redact a key in the logs of the HTTP packages from now on, at every level."""
    if key not in _key_filter.keys:
        _key_filter.keys |= key_spellings(key)
        for name in HTTP_LOGGERS:
            logging.getLogger(name).addFilter(_key_filter)  # has no effect the second time


def check_key(key: str) -> None:
    """Refuse a key that no header can carry (ConfigError), without repeating it."""
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError("the API key is empty or holds blanks, line breaks or other than ASCII characters.")
