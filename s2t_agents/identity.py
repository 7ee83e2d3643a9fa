"""What tells one setting from another in a cache key: its content, or a token of its own; never its address.

An address is given to another object when the first is gone, and to any object in another process.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from types import FunctionType
from typing import Any
from uuid import uuid4

_ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]+")
_BARE_REPRS: tuple[Any, ...] = (object.__repr__, type.__repr__, FunctionType.__repr__)

_tokens: dict[int, tuple[weakref.ref[Any], str]] = {}
"""By the object's ``id``; an entry goes with its object, before another can have the same one."""


def identity(value: Any) -> Any:
    """A value as plain data, equal for equal content, also in another process.

    Plain data stays as it is; containers are walked. An object is its ``repr`` where its class wrote one without an
    address in it, and which therefore tells whatever makes a difference. Any other object is a token of its own: equal
    for this very object alone.
    """
    if isinstance(value, Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if value is None or isinstance(value, (str, bytes, bool, int, float)):
        return value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {identity(name): identity(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [identity(each) for each in value]
    if isinstance(value, (set, frozenset)):  # their order differs between processes
        return sorted((identity(each) for each in value), key=repr)
    if type(value).__repr__ in _BARE_REPRS or _shows_only_its_shape(value):
        return token_of(value)
    shown = repr(value)
    return token_of(value) if _ADDRESS.search(shown) else shown


def new_token(name: str) -> str:
    """``name#...``: a text that is never given twice."""
    return f"{name}#{uuid4().hex[:16]}"


def token_of(value: Any) -> str:
    """The token of this very object as long as it lives; one that takes no weak reference gets another every time."""
    found = _tokens.get(id(value))
    if found is not None:
        return found[1]
    token = new_token(getattr(value, "__qualname__", type(value).__qualname__))
    at = id(value)
    try:
        kept = weakref.ref(value, lambda _: _tokens.pop(at, None))
    except TypeError:
        return token
    return _tokens.setdefault(at, (kept, token))[1]


def _shows_only_its_shape(value: Any) -> bool:
    """Of a torch module, torch's own repr tells layers and no weights; a tokenizer's tells its size."""
    by_torch = str(getattr(type(value).__repr__, "__module__", "")).startswith("torch.nn.")
    return by_torch or hasattr(value, "get_vocab")
