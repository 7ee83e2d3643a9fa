"""Many prefixes in lockstep: one forward appends a token to each. For rollouts and evaluation in bulk.

Rows are padded on the left, so that every row ends in the same column:

    row 0   . . . a b c d | e f     row 1   a b c d e f g | h i     (| the prompts' end, common to all)

Each row's logits equal those of its own ``TokenSequence`` (tests/test_training_batch.py holds it to 1e-4 in fp32).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from ..errors import ConfigError
from ..scheduling.language_model import LanguageModel
from .batch_kv import fork_of, joined

TOGETHER = 8
"""Prompts per forward, those of like length: with more, padding costs what is won."""

FINISHED = 1 / 8
"""Of the rows in a batch's KV: when so many have left it, the others are copied together. Until then they go along."""


class BatchPrefix:
    """B prefixes of one model and their KV; ``logits`` ``[B, V]`` and ``hidden`` ``[B, H]`` are those at their ends.

    Args:
        model: attention-only (plain or sliding).
        prompts: B token id lists, none of them empty.

    Raises:
        ConfigError: a model with recurrent layers, which padding would disturb.
    """

    @torch.inference_mode()
    def __init__(self, model: LanguageModel, prompts: Sequence[Sequence[int]]) -> None:
        if not model.capabilities.truncation:
            raise ConfigError(
                f"{model.name!r} has recurrent layers and cannot run in bulk.", hint="Use Engine.steps one by one."
            )
        self.model = model
        parts = []
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        for first in range(0, len(order), TOGETHER):
            rows, cache = order[first : first + TOGETHER], DynamicCache()
            ids, mask = left_padded([prompts[row] for row in rows], model.device)
            parts.append((rows, cache, self._forward(ids, mask, cache)))
        self._columns = left_padded(prompts, model.device)[1]
        self._cache = joined([(rows, cache) for rows, cache, _ in parts], *self._columns.shape)
        back = torch.tensor(order, device=model.device).argsort()
        self.logits: Tensor = torch.cat([logits for _, _, (logits, _) in parts])[back]
        self.hidden: Tensor = torch.cat([hidden for _, _, (_, hidden) in parts])[back]
        self._places = torch.arange(len(prompts), device=model.device)  # of our rows among those in the KV

    @property
    def mask(self) -> Tensor:
        """``[B, T]``: 1 for tokens, 0 for padding."""
        return self._columns[self._places]

    @torch.inference_mode()
    def extend(self, ids: Tensor) -> None:
        """Append ``[B, T]`` tokens."""
        everyone = ids.new_zeros(len(self._columns), ids.shape[1])
        everyone[self._places] = ids
        self._columns = torch.cat([self._columns, torch.ones_like(everyone)], dim=1)
        logits, hidden = self._forward(everyone, self._columns, self._cache)
        self.logits, self.hidden = logits[self._places], hidden[self._places]

    @torch.inference_mode()
    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.logits, self.hidden = self.logits[rows], self.hidden[rows]
        self._places = self._places[rows]
        there, wanted = len(self._columns), len(set(self._places.tolist()))
        if wanted < len(self._places) or wanted < there * (1 - FINISHED):
            self._compact()

    def fork(self) -> BatchPrefix:
        """An independent continuation of the same rows; nothing is copied until one of them grows."""
        other = copy.copy(self)
        other._cache = fork_of(self._cache)
        return other

    def score_candidates(self, rows: Tensor, candidates: Tensor) -> Tensor:
        """Last hidden state ``[N, K, H]`` after each of the candidates ``[N, K]`` of ``rows`` ``[N]``."""
        places = self._places[rows]
        return self.model.torch_backend.score_candidate_rows(candidates, places, self._columns, self._cache)

    @torch.inference_mode()
    def read_along(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Append ``[B, T]`` tokens; returns logits ``[B, 1 + T, V]``, of the end before and after each token.

        Args:
            ids: padding on the left.
            mask: ``[B, T]``, 0 for padding.
        """
        before = self.logits[:, None]
        if not ids.shape[1]:
            return before
        if len(self._places) < len(self._columns):
            self._compact()
        self._columns = torch.cat([self._columns, mask], dim=1)
        logits, hidden = self.model.torch_backend.read_rows(ids, self._columns, self._cache, ids.shape[1])
        self.logits, self.hidden = logits[:, -1], hidden[:, -1]
        return torch.cat([before, logits], 1)

    def _compact(self) -> None:
        """Nothing but our rows in the KV, in their order."""
        for layer in self._cache.layers:
            layer.keep(self._places)
        self._columns = self._columns[self._places]
        self._places = torch.arange(len(self._places), device=self._places.device)

    @torch.inference_mode()
    def _forward(self, ids: Tensor, mask: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
        """Logits ``[B, V]`` and hidden states ``[B, H]`` at the end of ``ids`` ``[B, T]``."""
        logits, hidden = self.model.torch_backend.read_rows(ids, mask, cache, 1)
        return logits[:, -1], hidden[:, -1]


class PromptReader:
    """Reads prompts with one model, each distinct one once until ``forget``: passes over the same prompts share their
    KV, and so do rows of one prompt.

    Args:
        model: see ``BatchPrefix``.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self._read: list[tuple[dict[tuple[int, ...], int], BatchPrefix]] = []

    def __call__(self, prompts: Sequence[Sequence[int]]) -> BatchPrefix:
        """One row per prompt, in their order; the caller's own to grow."""
        rows = [tuple(prompt) for prompt in prompts]
        places, prefix = self._holding(rows)
        own = prefix.fork()
        wanted = [places[row] for row in rows]
        if wanted != list(range(len(places))):
            own.keep(torch.tensor(wanted, device=self.model.device))
        return own

    def _holding(self, rows: Sequence[tuple[int, ...]]) -> tuple[dict[tuple[int, ...], int], BatchPrefix]:
        """A batch that holds all of these prompts, and the place of each in it."""
        for places, prefix in self._read:
            if all(row in places for row in rows):
                return places, prefix
        places = {row: at for at, row in enumerate(dict.fromkeys(rows))}
        self._read.append((places, BatchPrefix(self.model, list(places))))
        return self._read[-1]

    def forget(self) -> None:
        """Free the KV; other prompts come."""
        self._read.clear()


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask, both ``[B, T]``: rows of different length, right-aligned."""
    width = max(map(len, rows))
    ids = [[0] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
