"""Settings without what opens doors: for dumps, pickles, traces, cache keys and whatever else is written down."""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote_plus

from pydantic import SecretBytes, SecretStr

_SECRET = re.compile(
    r"(.*[_-])?(auth|token|authorization|cookie|secret|pass|passwd|passphrase|pwd|jwt|bearer|otp|credentials?)"
    r"|(.*[_-])?(api|access|signing|signature|encryption|ssh|master|license|shared|function|subscription)_?key"
    r"|.*(api|access|account|private|secret|session|auth|hf)[_-]?(key|token|secret|id_secret)"
    r"|.*[_-]pat|.*secret.*|.*password.*|.*service_?account.*|session_?id|sas[_-]?token|use_auth_token"
    r"|set-cookie",
    re.IGNORECASE,
)
"""Names whose text opens doors. Numbers and flags (``token=True``: the one of this machine's login) say nothing."""

_CARRIER = re.compile(r"(.*[_-])?(headers|cookies)", re.IGNORECASE)
"""Names of mappings, or of lists of pairs, whose every value may open doors."""

_SECRET_IN_QUERY = re.compile(r".*(key|sig|signature)|code", re.IGNORECASE)
"""Names of a URL's query that do so as well."""

_USER = re.compile(r"(?<=://)[^/?#\s@]*(?:@[^/?#\s@]*)*@")
_ODD_PASSWORD = re.compile(r"(?<=://)[^/?#\s@:]*:(?!\d*(?:[/?#\s]|$))[^\s]*@")
"""One with a / or # that should have been escaped; what follows a host's colon is a port."""
_USER_ALONE = re.compile(r"(?!mailto:)[^\s/@:]+:[^\s/]+@(?=[^\s/@]+(/\S*)?$)", re.IGNORECASE)
"""Of a proxy that is given without a scheme."""
_QUERY = re.compile(r"(?<=[?&;#])([^=&;#?\s]+)=([^&;#\s]*)")
_HEADER = re.compile(r"([A-Za-z][\w-]*):\s*(\S.*)")
_SCHEME = re.compile(r"(Bearer|Basic|Token|Digest|Negotiate)\s+(\S+)", re.IGNORECASE)
_HIDDEN = "***"


def without_secrets(value: Any) -> Any:
    """The same, without entries of secret names and without credentials in URLs and headers, however deep they lie.

    What holds none comes back as it is: the same object.
    """
    if isinstance(value, str):
        clean = _clean(value)
        return value if clean == value else clean
    if isinstance(value, (bytes, bytearray)):
        clean = _clean(text := bytes(value).decode("latin-1"))
        return value if clean == text else clean.encode("latin-1")
    if isinstance(value, Mapping):
        kept = {
            without_secrets(name): without_secrets(each)
            for name, each in value.items()
            if not ((_names_one(name) and _opens(each)) or _carries(name, each))
        }
        return value if _same(kept, value) and _same(kept.values(), value.values()) else kept
    if isinstance(value, (list, tuple, set, frozenset)):
        pairs = _are_pairs(value)
        each_clean = [
            _second_hidden(each) if pairs and _names_one(each[0]) else without_secrets(each) for each in value
        ]
        if _same(each_clean, value):
            return value
        return type(value)(*each_clean) if hasattr(value, "_fields") else type(value)(each_clean)
    return None if isinstance(value, (SecretStr, SecretBytes)) else value


def _clean(text: str) -> str:
    if (header := _HEADER.fullmatch(text)) and _names_one(header[1]):
        return f"{header[1]}: {_HIDDEN}"
    if (scheme := _SCHEME.fullmatch(text)) and (scheme[1].lower() == "bearer" or _encodes_a_user(scheme[2])):
        return f"{scheme[1]} {_HIDDEN}"
    text = _USER_ALONE.sub(f"{_HIDDEN}@", text) if _USER_ALONE.match(text) else text
    text = _USER.sub(f"{_HIDDEN}@", _ODD_PASSWORD.sub(f"{_HIDDEN}@", text))
    return _QUERY.sub(_asked, text)


def _asked(entry: re.Match[str]) -> str:
    name = unquote_plus(entry[1])
    return f"{entry[1]}={_HIDDEN}" if _SECRET.fullmatch(name) or _SECRET_IN_QUERY.fullmatch(name) else entry[0]


def _encodes_a_user(text: str) -> bool:
    try:
        return b":" in b64decode(text, validate=True)
    except ValueError:
        return False


def _carries(name: Any, value: Any) -> bool:
    return isinstance(name, str) and bool(_CARRIER.fullmatch(name)) and (_is_full(value) or _are_pairs(value))


def _is_full(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value)


def _are_pairs(value: Any) -> bool:
    """Headers or the like as a list of names and values."""
    return isinstance(value, (list, tuple)) and bool(value) and all(map(_is_pair, value))


def _is_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and isinstance(value[0], (str, bytes))


def _second_hidden(pair: Any) -> Any:
    return type(pair)((pair[0], _HIDDEN)) if _opens(pair[1]) and not hasattr(pair, "_fields") else pair


def _names_one(name: Any) -> bool:
    text = name.decode("latin-1") if isinstance(name, bytes) else name
    return isinstance(text, str) and _SECRET.fullmatch(text) is not None


def _opens(value: Any) -> bool:
    return not (value is None or isinstance(value, (bool, int, float)))


def _same(ones: Any, others: Any) -> bool:
    return len(ones) == len(others) and all(one is other for one, other in zip(ones, others, strict=True))
