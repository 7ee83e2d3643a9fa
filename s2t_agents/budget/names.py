"""From any identifier to the name of a meter."""

from __future__ import annotations

import hashlib
import re

MAX_NAME = 200
_UNUSABLE = re.compile(r"[%/\0\ud800-\udfff]")  # separators, and lone surrogates, which not every store can hold


def meter_name(identifier: str) -> str:
    """One name for each identifier: what no path can hold is escaped, long ones are cut and told apart by a hash."""
    name = _UNUSABLE.sub(lambda found: f"%{ord(found[0]):02X}", identifier) or "%"
    if len(name) <= MAX_NAME:
        return name
    return f"{name[:100]}…{hashlib.sha256(identifier.encode(errors='surrogatepass')).hexdigest()[:32]}"
