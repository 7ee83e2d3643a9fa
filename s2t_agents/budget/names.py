"""Names of budgets, which are the parts of a meter's path."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from ..errors import ConfigError

MAX_NAME = 200
_UNUSABLE = re.compile(r"[/\0\ud800-\udfff]")  # the separator, and lone surrogates, which not every store can hold
_ESCAPED = re.compile(r"[%/\0\ud800-\udfff]")


def checked_name(name: Any) -> str:
    """A name that can be part of a path.

    Raises:
        ConfigError: it cannot.
    """
    if not isinstance(name, str) or not name or len(name) > MAX_NAME or _UNUSABLE.search(name):
        raise ConfigError(
            f"Budget name {name!r} must be 1 to {MAX_NAME} characters without '/'.", hint="Name it after its agent."
        )
    return name


def meter_name(identifier: str) -> str:
    """One name for each identifier: what no path can hold is escaped, long ones are cut and told apart by a hash."""
    name = _ESCAPED.sub(lambda found: f"%{ord(found[0]):02X}", identifier) or "%"
    if len(name) <= MAX_NAME:
        return name
    return f"{name[:100]}…{hashlib.sha256(identifier.encode(errors='surrogatepass')).hexdigest()[:32]}"
