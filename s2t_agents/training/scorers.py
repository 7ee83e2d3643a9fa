"""Local selectors for many rows at once: the same scores as ``Selector.scores`` gives one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ..selectors import LocalSelector
from ..selectors.activated import ActivatedSelector
from ..selectors.adapted import AdaptedSelector
from ..selectors.head import HeadSelector
from ..selectors.published import PublishedSelector
from .batch_prefix import BatchPrefix, PromptReader
from .lines import Line
from .lockstep import View


class Scorer(Protocol):
    """Scores candidates of some rows of a batch.

    Attributes:
        forwards: SLM forward passes per selection (of one row).
    """

    forwards: int

    @property
    def lines(self) -> Sequence[Line]:
        """KV of its own that it needs kept in step."""
        ...

    def scores(self, view: View, rows: Tensor, candidates: Tensor, slm: Tensor) -> Tensor:
        """``[N, K]`` scores of ``candidates`` ``[N, K]`` of the living ``rows`` ``[N]``."""
        ...


class HeadScorer:
    """No forward at all."""

    forwards = 0
    lines: Sequence[Line] = ()

    def __init__(self, selector: HeadSelector) -> None:
        self._selector = selector

    @torch.inference_mode()
    def scores(self, view: View, rows: Tensor, candidates: Tensor, slm: Tensor) -> Tensor:
        """As ``HeadSelector.scores``."""
        correction = self._selector.correction(view.prefix.hidden[rows], candidates)
        return self._selector.calibrated(slm, correction)


class ActivatedScorer:
    """One forward over the base's KV, the adapter on."""

    forwards = 1
    lines: Sequence[Line] = ()

    def __init__(self, selector: ActivatedSelector) -> None:
        self._selector = selector

    @torch.inference_mode()
    def scores(self, view: View, rows: Tensor, candidates: Tensor, slm: Tensor) -> Tensor:
        """As ``ActivatedSelector.scores``."""
        base = self._selector.base
        with base.lock, self._selector.lora.on(base.model):
            hidden = view.prefix.score_candidates(rows, candidates)
        return self._selector.calibrated(slm, self._selector.correction(hidden))


class AdaptedScorer:
    """A KV of its own, adapter on, which is caught up."""

    forwards = 1

    def __init__(self, selector: AdaptedSelector, start: Callable[[], BatchPrefix]) -> None:
        self._selector = selector
        self._line = Line(start, lambda: selector.lora.on(selector.base.model))
        self.lines: Sequence[Line] = [self._line]

    @torch.inference_mode()
    def scores(self, view: View, rows: Tensor, candidates: Tensor, slm: Tensor) -> Tensor:
        """As ``AdaptedSelector.scores``."""
        with self._selector.base.lock:
            logits = self._line.prefix().logits[rows]
        return self._selector.calibrated(slm, self._selector.correction(slm, logits, candidates))


class PublishedScorer:
    """One forward over a KV of its own, adapter on throughout; that KV is caught up first."""

    forwards = 2

    def __init__(self, selector: PublishedSelector, start: Callable[[], BatchPrefix]) -> None:
        self._selector = selector
        self._line = Line(start, lambda: selector.lora.on(selector.base.model))
        self.lines: Sequence[Line] = [self._line]

    @torch.inference_mode()
    def scores(self, view: View, rows: Tensor, candidates: Tensor, slm: Tensor) -> Tensor:
        """As ``PublishedSelector.scores``."""
        base = self._selector.base
        with base.lock:
            prefix = self._line.prefix()
            with self._selector.lora.on(base.model):
                hidden = prefix.score_candidates(rows, candidates)
        return self._selector.calibrated(slm, self._selector.correction(hidden))


class OwnOrder:
    """No selector: the SLM's own order stands."""

    forwards = 0
    lines: Sequence[Line] = ()

    def scores(self, view: View, rows: Tensor, candidates: Tensor, slm: Tensor) -> Tensor:
        """The log-probabilities as they are."""
        return slm


def scorer_for(selector: LocalSelector, prompts: Sequence[Sequence[int]], reader: PromptReader | None = None) -> Scorer:
    """The bulk form of a selector, for one batch of prompts.

    Args:
        selector: local.
        prompts: of the batch.
        reader: what this selector has read of them with its adapter on.
    """
    if isinstance(selector, HeadSelector):
        return HeadScorer(selector)
    if isinstance(selector, ActivatedSelector):
        return ActivatedScorer(selector)
    start = partial(reader or PromptReader(selector.base), prompts)
    return AdaptedScorer(selector, start) if isinstance(selector, AdaptedSelector) else PublishedScorer(selector, start)
