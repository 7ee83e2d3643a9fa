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


class BatchPrefix:
    """B prefixes of one model and their KV; ``logits`` ``[B, V]`` and ``hidden`` ``[B, H]`` are those at their ends.

    Args:
        model: attention-only (plain or sliding).
        prompts: B token id lists, none of them empty.

    Raises:
        ConfigError: a model with recurrent layers, which padding would disturb.
    """

    def __init__(self, model: LanguageModel, prompts: Sequence[Sequence[int]]) -> None:
        if not model.capabilities.truncation:
            raise ConfigError(
                f"{model.name!r} has recurrent layers and cannot run in bulk.", hint="Use Engine.steps one by one."
            )
        self.model = model
        self.logits: Tensor = torch.empty(0)
        self.hidden: Tensor = torch.empty(0)
        self._cache: Cache = DynamicCache()
        ids, self.mask = left_padded(prompts, model.device)
        self._read(ids)

    @torch.inference_mode()
    def extend(self, ids: Tensor, mask: Tensor | None = None) -> None:
        """Append ``[B, T]`` tokens; ``mask`` ``[B, T]`` is needed only where padding is among them."""
        self.mask = torch.cat([self.mask, torch.ones_like(ids) if mask is None else mask], dim=1)
        self._read(ids)

    @torch.inference_mode()
    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self._cache.batch_select_indices(rows)
        self.mask, self.logits, self.hidden = self.mask[rows], self.logits[rows], self.hidden[rows]

    def fork(self) -> BatchPrefix:
        """An independent continuation of the same rows; nothing is copied until one of them grows."""
        other = copy.copy(self)
        other._cache = Cache(layers=[copy.copy(layer) for layer in self._cache.layers])
        return other

    def score_candidates(self, rows: Tensor, candidates: Tensor) -> Tensor:
        """Last hidden state ``[N, K, H]`` after each of the candidates ``[N, K]`` of ``rows`` ``[N]``."""
        return self.model.torch_backend.score_candidate_rows(candidates, rows, self.mask, self._cache)

    @torch.inference_mode()
    def read_along(self, ids: Tensor, mask: Tensor) -> Tensor:
        """``extend`` by ``[B, T]`` tokens; returns logits ``[B, 1 + T, V]``, of the end before and after each token."""
        before = self.logits[:, None]
        if not ids.shape[1]:
            return before
        self.mask = torch.cat([self.mask, mask], dim=1)
        logits, hidden = self.model.torch_backend.read_rows(ids, self.mask, self._cache, ids.shape[1])
        self.logits, self.hidden = logits[:, -1], hidden[:, -1]
        return torch.cat([before, logits], 1)

    @torch.inference_mode()
    def _read(self, ids: Tensor) -> None:
        logits, hidden = self.model.torch_backend.read_rows(ids, self.mask, self._cache, 1)
        self.logits, self.hidden = logits[:, -1], hidden[:, -1]


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
