"""From any identifier to the name of a meter."""

from __future__ import annotations

import hashlib

MAX_NAME = 200


def meter_name(identifier: str) -> str:
    """One name for each identifier: slashes escaped, long ones cut and told apart by a hash."""
    name = identifier.replace("%", "%25").replace("/", "%2F").replace("\0", "%00") or "%"
    if len(name) <= MAX_NAME:
        return name
    return f"{name[:100]}…{hashlib.sha256(identifier.encode()).hexdigest()[:32]}"
