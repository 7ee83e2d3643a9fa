"""Many prefixes in lockstep: one forward appends a token to each. For rollouts and evaluation in bulk.

Rows are padded on the left, so that every row ends in the same column:

    row 0   . . . a b c d | e f     row 1   a b c d e f g | h i     (| the prompts' end, common to all)

Each row's logits equal those of its own ``Prefix`` (tests/test_training_batch.py holds it to 1e-4 in fp32).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from ..backends.torch.language_model import LanguageModel
from ..errors import ConfigError


class BatchPrefix:
    """B prefixes of one model and their KV; ``logits`` ``[B, V]`` and ``hidden`` ``[B, H]`` are those at their ends.

    Args:
        model: attention-only (plain or sliding).
        prompts: B token id lists, none of them empty.

    Raises:
        ConfigError: a model with recurrent layers, which padding would disturb.
    """

    def __init__(self, model: LanguageModel, prompts: Sequence[Sequence[int]]) -> None:
        if not model.overlay_exact:
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

    def look_ahead(self, rows: Tensor, candidates: Tensor) -> Tensor:
        """Last hidden state ``[N, K, H]`` after each of the candidates ``[N, K]`` of ``rows`` ``[N]``."""
        return self.model.look_ahead_rows(candidates, rows, self.mask, self._cache)

    @torch.inference_mode()
    def _read(self, ids: Tensor) -> None:
        logits, hidden = self.model.read_rows(ids, self.mask, self._cache, 1)
        self.logits, self.hidden = logits[:, -1], hidden[:, -1]


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask, both ``[B, T]``: rows of different length, right-aligned."""
    width = max(map(len, rows))
    ids = [[0] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
