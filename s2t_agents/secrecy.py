"""Settings without what opens doors: for dumps, pickles, traces, cache keys and whatever else is written down."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import SecretBytes, SecretStr

_SECRET = re.compile(
    r"(.*[_-])?(auth|token|authorization|cookie|secret|password|passwd|credentials?|api_?key|access_?key)"
    r"|.*(api|access|account|private|secret|session|auth|hf)[_-]?(key|token|secret|id_secret)"
    r"|.*secret.*|.*password.*|sas[_-]?token|use_auth_token|set-cookie",
    re.IGNORECASE,
)
"""Names whose text opens doors. Numbers and flags (``token=True``: the one of this machine's login) say nothing."""

_USER = re.compile(r"(?<=://)[^/?#\s@]*(?:@[^/?#\s@]*)*@")
_QUERY = re.compile(r"(?<=[?&])([^=&#\s]*(?:token|key|secret|password|signature|sig)=)[^&#\s]*", re.IGNORECASE)


def without_secrets(value: Any) -> Any:
    """The same, without entries of secret names and without credentials in URLs, however deep they lie.

    What holds none comes back as it is: the same object.
    """
    if isinstance(value, str):
        clean = _QUERY.sub(r"\1***", _USER.sub("***@", value))
        return value if clean == value else clean
    if isinstance(value, Mapping):
        kept = {name: without_secrets(each) for name, each in value.items() if not (_names_one(name) and _opens(each))}
        return value if _same(kept.values(), value.values()) else kept
    if isinstance(value, (list, tuple, set, frozenset)):
        each_clean = [without_secrets(each) for each in value]
        if _same(each_clean, value):
            return value
        return type(value)(*each_clean) if hasattr(value, "_fields") else type(value)(each_clean)
    return None if isinstance(value, (SecretStr, SecretBytes)) else value


def _names_one(name: Any) -> bool:
    return isinstance(name, str) and _SECRET.fullmatch(name) is not None


def _opens(value: Any) -> bool:
    return not (value is None or isinstance(value, (bool, int, float)))


def _same(ones: Any, others: Any) -> bool:
    return len(ones) == len(others) and all(one is other for one, other in zip(ones, others, strict=True))
