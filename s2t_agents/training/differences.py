"""What a folder was made from, against what is wanted now: which settings differ, and how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

GROUPS = {"fit": "", "settings": "", "selectors": "selector "}
"""How a group's settings are called: by their own names, or with a word before them."""

NAMES = {
    "items": "number of prompts",
    "prompts_hash": "prompts (hash)",
    "rollouts": "rollouts (hash)",
    "paid": "paid selections (hash)",
}


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Each setting that differs, with both values: ``max_tokens is 160 there and 48 now``; empty where none does.

    Args:
        there: as read from JSON; what is missing counts as None.
        now: the same, of what is wanted.
    """
    return "; ".join(_differing(there, now, ""))


def _differing(there: Mapping[str, Any], now: Mapping[str, Any], within: str) -> Iterator[str]:
    for name in dict.fromkeys([*now, *there]):
        old, new = there.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differing(old, new, within + GROUPS.get(name, f"{name} "))
        elif old != new:
            yield f"{within}{NAMES.get(name, name)} is {_shown(old)} there and {_shown(new)} now"


def _shown(value: Any) -> str:
    return "none" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
