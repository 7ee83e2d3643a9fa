"""Weights, loaded once in this process for all chat models with the same settings."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from hashlib import sha256
from typing import Any
from weakref import WeakValueDictionary

import torch
from pydantic import SecretStr

from ..fork_safety import SHARING, hold_while_forking
from ..identity import identity
from ..scheduling.language_model import LanguageModel
from .engine_settings import torch_dtype

_lock = threading.RLock()
_loaded: WeakValueDictionary[str, LanguageModel] = WeakValueDictionary()
hold_while_forking(sys.modules[__name__], "_lock", SHARING)


def shared_model(
    model: str | LanguageModel, *, device: str | None, dtype: torch.dtype | str | None, options: Mapping[str, Any]
) -> LanguageModel:
    """The model, loaded once per (path, device, dtype, options) in this process while a reference to it exists.

    Raises:
        ConfigError: no such dtype.
        ModelNotFound, UnsafeWeights: see ``backends.torch.loading``.
    """
    if isinstance(model, LanguageModel):
        return model
    key = repr((model, device, dtype, sorted((name, _sharing_key(value)) for name, value in options.items())))
    with _lock:
        found = _loaded.get(key)
        if found is None:
            found = LanguageModel.load(model, device=device, dtype=torch_dtype(dtype), **options)
            _loaded[key] = found
        return found


def _sharing_key(value: Any) -> Any:
    """What tells options apart; a secret is told from another, which its repr does not."""
    if isinstance(value, SecretStr):
        return sha256(value.get_secret_value().encode()).hexdigest()
    return identity(value)
