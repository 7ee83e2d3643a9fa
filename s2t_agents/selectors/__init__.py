"""Selectors: objects that answer which of K candidates comes next. See ``base.Selector`` for the protocol."""

from __future__ import annotations

from pathlib import Path

from ..models.bundled import selector_path
from ..models.language_model import LanguageModel
from ..models.loading import ONE_AT_A_TIME
from .activated import ActivatedSelector
from .base import Selector, confidence_margin
from .breaker import CircuitBreaker
from .config import SelectorConfig
from .head import HeadSelector
from .judge import ChatJudge
from .learned_trigger import calibrated_trigger
from .llm import LLMSelector, LLMSession
from .local_llm import LocalLLM
from .openai_llm import OpenAILLM
from .published import PublishedSelector
from .question import Answer, Question

LocalSelector = ActivatedSelector | HeadSelector | PublishedSelector

KINDS: dict[str, type[ActivatedSelector] | type[HeadSelector] | type[PublishedSelector]] = {
    "activated": ActivatedSelector,
    "head": HeadSelector,
    "published": PublishedSelector,
}
"""Trainable selectors by the ``kind`` in their config. To add one: a class with scores, save and load."""


def load_selector(path: str | Path, base: LanguageModel) -> tuple[LocalSelector, SelectorConfig]:
    """The selector in a directory (or the name of a bundled one), and its config.

    Raises:
        ModelNotFound, ConfigError, AdapterMismatch, UnsafeWeights: see ``SelectorConfig.load`` and the kinds.
    """
    folder = selector_path(path)
    config = SelectorConfig.load(folder)
    with ONE_AT_A_TIME:
        return KINDS[config.kind].load(folder, base, config), config


__all__ = [
    "KINDS",
    "ActivatedSelector",
    "Answer",
    "ChatJudge",
    "CircuitBreaker",
    "HeadSelector",
    "LLMSelector",
    "LLMSession",
    "LocalLLM",
    "LocalSelector",
    "OpenAILLM",
    "PublishedSelector",
    "Question",
    "Selector",
    "SelectorConfig",
    "calibrated_trigger",
    "confidence_margin",
    "load_selector",
]
