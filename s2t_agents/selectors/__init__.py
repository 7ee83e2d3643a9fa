"""Selectors: objects that answer which of K candidates comes next. See ``base.Selector`` for the protocol."""

from __future__ import annotations

from pathlib import Path

from ..models.language_model import LanguageModel
from .activated import ActivatedSelector
from .base import Selector, confidence_margin
from .config import SelectorConfig
from .head import HeadSelector
from .llm import LLMSelector, LLMSession
from .local_llm import LocalLLM

KINDS: dict[str, type[ActivatedSelector] | type[HeadSelector]] = {"activated": ActivatedSelector, "head": HeadSelector}
"""Trainable selectors by the ``kind`` in their config. To add one: a class with scores, save and load."""


def load_selector(path: str | Path, base: LanguageModel) -> tuple[ActivatedSelector | HeadSelector, SelectorConfig]:
    """The selector in a directory and its config.

    Raises:
        ModelNotFound, ConfigError, AdapterMismatch, UnsafeWeights: see ``SelectorConfig.load`` and the kinds.
    """
    config = SelectorConfig.load(Path(path))
    return KINDS[config.kind].load(Path(path), base, config), config


__all__ = [
    "KINDS",
    "ActivatedSelector",
    "HeadSelector",
    "LLMSelector",
    "LLMSession",
    "LocalLLM",
    "Selector",
    "SelectorConfig",
    "confidence_margin",
    "load_selector",
]
