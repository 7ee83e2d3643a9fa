"""Redaction of secrets in settings, for dumps, pickles, traces, cache keys and logs; texts from outside, escaped."""

from __future__ import annotations

import re
from base64 import b64decode
from collections import UserList, deque
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote_plus

from pydantic import SecretBytes, SecretStr

_SECRET_NAME = re.compile(
    r"(.*[_-])?(auth|token|authorization|cookies?|secret|pass|passwd|passphrase|pwd?|jwts?|bearer|otp)"
    r"|(.*[_-])?(cred(ential)?s?|sas)"
    r"|(.*[_-])?(api|access|signing|signature|encryption|ssh|master|license|shared|function|subscription)_?keys?"
    r"|.*(api|access|account|private|secret|session|auth|hf|refresh|id|csrf|github)[_-]?(key|token|secret|id_secret)s?"
    r"|tokens"
    r"|.*[_-]pat|.*secret.*|.*password.*|.*service_?account.*|session_?id|sas[_-]?token|use_auth_token"
    r"|set-cookie",
    re.IGNORECASE,
)
"""Names of secrets, ``camelCase`` written as ``camel_Case``. Numbers and flags under these names are not secret
(``token=True``: use this machine's login)."""

_OF_A_TOKENIZER = re.compile(r"(bos|eos|pad|unk|sep|cls|mask|image|audio|video)_token", re.IGNORECASE)
"""Tokens that are no secrets."""

_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")

_HEADERS_NAME = re.compile(r"(.*[_-])?(headers|cookies)", re.IGNORECASE)
"""Names of mappings, or of lists of pairs, of which every value may be secret."""

_SECRET_QUERY_NAME = re.compile(r".*(key|sig|signature)|code", re.IGNORECASE)
"""Further names of secrets in a URL's query."""

_URL_USERINFO = re.compile(r"(?<=://)[^/?#\s@]*(?:@[^/?#\s@]*)*@")
_UNESCAPED_PASSWORD = re.compile(r"(?<=://)[^/?#\s@:]*:(?!\d*(?:[/?#\s]|$))(?:[^\s]*@|\S[^@]{0,200}@)")
"""A password in a URL with an unescaped /, # or blank; digits after a host's colon are a port."""
_PROXY_USERINFO = re.compile(r"(?!mailto:)[^\s/@:]+:[^\s/]+@(?=[^\s/@]+(/\S*)?$)", re.IGNORECASE)
"""User and password of a proxy given without a scheme."""
_QUERY_ENTRY = re.compile(r"(?<=[?&;#])([^=&;#?\s]+)=([^&;#\s]*)")
_HEADER = re.compile(r"([A-Za-z][\w-]*):\s*(\S.*)")
_AUTH_SCHEME = re.compile(r"(Bearer|Basic|Token|Digest|Negotiate)\s+(\S+)", re.IGNORECASE)
_REDACTED = "***"


def without_secrets(value: Any) -> Any:
    """A value without entries under secret names and without credentials in URLs and headers, at any depth.

    A value without secrets is returned as the same object.
    """
    if isinstance(value, str):
        clean = _redact_text(value)
        return value if clean == value else clean
    if isinstance(value, (bytes, bytearray)):
        clean = _redact_text(text := bytes(value).decode("latin-1"))
        return value if clean == text else clean.encode("latin-1")
    if isinstance(value, Mapping):
        kept = {
            without_secrets(name): without_secrets(each)
            for name, each in value.items()
            if not ((_is_secret_name(name) and _may_hold_secret(each)) or _holds_headers(name, each))
        }
        if _names_a_secret(value):
            kept.pop("value", None)
        return value if _is_unchanged(kept, value) and _is_unchanged(kept.values(), value.values()) else kept
    if isinstance(value, (list, tuple, set, frozenset, deque, UserList)):
        pairs = _all_are(_is_pair, value)
        each_clean = [
            _redact_pair(each) if pairs and _is_secret_name(each[0]) else without_secrets(each) for each in value
        ]
        if _is_unchanged(each_clean, value):
            return value
        if isinstance(value, deque):
            return deque(each_clean, value.maxlen)
        return type(value)(*each_clean) if hasattr(value, "_fields") else type(value)(each_clean)
    return None if isinstance(value, (SecretStr, SecretBytes)) else value


def url_without_secrets(value: Any) -> Any:
    """A URL without user and password and without secrets in its query; anything else as it is."""
    return without_secrets(value) if isinstance(value, str) and "://" in value else value


def _redact_text(text: str) -> str:
    if (header := _HEADER.fullmatch(text)) and _is_secret_name(header[1]):
        return f"{header[1]}: {_REDACTED}"
    if (scheme := _AUTH_SCHEME.fullmatch(text)) and (scheme[1].lower() == "bearer" or _is_basic_auth(scheme[2])):
        return f"{scheme[1]} {_REDACTED}"
    text = _PROXY_USERINFO.sub(f"{_REDACTED}@", text) if _PROXY_USERINFO.match(text) else text
    text = _URL_USERINFO.sub(f"{_REDACTED}@", _UNESCAPED_PASSWORD.sub(f"{_REDACTED}@", text))
    return _QUERY_ENTRY.sub(_redact_query_entry, text)


def _redact_query_entry(entry: re.Match[str]) -> str:
    name = unquote_plus(entry[1])
    return f"{entry[1]}={_REDACTED}" if _is_secret_name(name) or _SECRET_QUERY_NAME.fullmatch(name) else entry[0]


def _is_basic_auth(text: str) -> bool:
    try:
        return b":" in b64decode(text, validate=True)
    except ValueError:
        return False


def _holds_headers(name: Any, value: Any) -> bool:
    if not isinstance(name, str) or not _HEADERS_NAME.fullmatch(name):
        return False
    return bool(isinstance(value, Mapping) and value) or _all_are(_is_pair, value) or _all_are(_is_named_value, value)


def _all_are(kind: Callable[[Any], bool], value: Any) -> bool:
    """Whether it is a list, not an empty one, of such values."""
    return isinstance(value, (list, tuple)) and bool(value) and all(map(kind, value))


def _is_named_value(value: Any) -> bool:
    """Whether it is ``{"name": ..., "value": ...}``, as a header may be given."""
    return isinstance(value, Mapping) and "value" in value and ("name" in value or "key" in value)


def _names_a_secret(value: Mapping[Any, Any]) -> bool:
    """Whether it is ``{"name": ..., "value": ...}`` with a secret name."""
    names = (value.get("name"), value.get("key"))
    return _is_named_value(value) and any(map(_is_secret_name, names)) and _may_hold_secret(value["value"])


def _is_pair(value: Any) -> bool:
    """Whether it is (name, value), as a header may be given."""
    return isinstance(value, (list, tuple)) and len(value) == 2 and isinstance(value[0], (str, bytes))


def _redact_pair(pair: Any) -> Any:
    return type(pair)((pair[0], _REDACTED)) if _may_hold_secret(pair[1]) and not hasattr(pair, "_fields") else pair


def _is_secret_name(name: Any) -> bool:
    text = name.decode("latin-1") if isinstance(name, bytes) else name
    if not isinstance(text, str) or _OF_A_TOKENIZER.fullmatch(text):
        return False
    return _SECRET_NAME.fullmatch(_CAMEL.sub("_", text)) is not None


def _may_hold_secret(value: Any) -> bool:
    if isinstance(value, (list, tuple)) and value:
        return any(map(_may_hold_secret, value))  # ids of tokens are none
    return not (value is None or isinstance(value, (bool, int, float)))


def _is_unchanged(ones: Any, others: Any) -> bool:
    return len(ones) == len(others) and all(one is other for one, other in zip(ones, others, strict=True))


def one_line(text: str) -> str:
    """A text from outside for a line of a log: what would end the line, or steer a terminal, is escaped."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def storable(text: str) -> str:
    """A text from outside for a file, a response or an exporter: lone surrogates, which none takes, are escaped."""
    return text.encode(errors="backslashreplace").decode()
