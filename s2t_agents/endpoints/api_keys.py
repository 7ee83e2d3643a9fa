"""API keys: what a header can carry, and their redaction in texts and logs."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from functools import lru_cache

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


@lru_cache(maxsize=1024)
def _spellings(key: str) -> re.Pattern[str]:
    """A key verbatim, with backslashes as in a repr or in JSON, and with any characters percent-encoded."""
    return re.compile("".join(map(_spelled, re.findall(r"\\+|[^\\]", key))))


def _spelled(part: str) -> str:
    """The pattern of one character, or of a run of backslashes, which escaping doubles (at most twice)."""
    code = f"{ord(part[0]):02x}"
    if part[0] == "\\":
        return rf"(?:(?i:%{code}|\\{{1,4}}+(?:u00|x){code})|\\){{{len(part)},{4 * len(part)}}}+"
    return rf"(?:(?i:%{code})|\\{{0,4}}+(?:(?i:u00{code}|x{code})|{re.escape(part)}))"


def redact(text: str, keys: Iterable[str]) -> str:
    """A text with every key redacted, the longest first, since one may be part of another.

    The text must be whole: of a key that was cut off, what is left is not found.
    """
    for key in sorted(keys, key=len, reverse=True):
        text = _spellings(key).sub(REDACTED, text)
    return text


def redact_in_logs(key: str) -> None:
    """Redact a key in the logs of the HTTP packages from now on, at every level."""
    if key not in _key_filter.keys:
        _key_filter.keys |= {key}
        for name in HTTP_LOGGERS:
            logging.getLogger(name).addFilter(_key_filter)  # has no effect the second time


def check_key(key: str) -> None:
    """Refuse a key that no header can carry (ConfigError), without repeating it."""
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError("the API key is empty or holds blanks, line breaks or other than ASCII characters.")
