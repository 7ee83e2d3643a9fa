"""Local selectors, which rank the SLM's K candidates. ``base.Selector`` is the protocol."""

from __future__ import annotations

from pathlib import Path

from ..backends.torch.loading import ONE_AT_A_TIME
from ..bundled import selector_path
from ..scheduling.language_model import LanguageModel
from .activated import ActivatedSelector
from .adapted import AdaptedSelector
from .base import Selector, confidence_margin
from .config import SelectorConfig
from .head import HeadSelector
from .learned_trigger import calibrated_trigger
from .published import PublishedSelector
from .reference import warn_of_another_form

LocalSelector = ActivatedSelector | AdaptedSelector | HeadSelector | PublishedSelector

KINDS: dict[str, type[ActivatedSelector] | type[AdaptedSelector] | type[HeadSelector] | type[PublishedSelector]] = {
    "activated": ActivatedSelector,
    "adapted": AdaptedSelector,
    "head": HeadSelector,
    "published": PublishedSelector,
}
"""Trainable selectors by the ``kind`` in their config. To add one: a class with scores, save and load."""


def load_selector(path: str | Path, base: LanguageModel) -> tuple[LocalSelector, SelectorConfig]:
    """Load the selector in a directory, or a bundled one by name, and its config.

    On another backend or quantization of its base, one warning tells how much they differ.

    Raises:
        ModelNotFound, ConfigError, AdapterMismatch, UnsafeWeights: see ``SelectorConfig.load`` and the kinds.
    """
    folder = selector_path(path)
    config = SelectorConfig.load(folder)
    with ONE_AT_A_TIME:
        selector = KINDS[config.kind].load(folder, base, config)
    warn_of_another_form(folder, selector, base, config)
    return selector, config


__all__ = [
    "KINDS",
    "ActivatedSelector",
    "AdaptedSelector",
    "HeadSelector",
    "LocalSelector",
    "PublishedSelector",
    "Selector",
    "SelectorConfig",
    "calibrated_trigger",
    "confidence_margin",
    "load_selector",
]
