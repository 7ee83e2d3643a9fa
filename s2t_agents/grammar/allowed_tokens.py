"""A fixed set of tokens that are legal at every step, as a grammar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from ..greedy import argmax


class AllowedTokens:
    """A ``Grammar`` whose every token is one of a set.

    Args:
        ids: the tokens.
        size: V, of the logits.
    """

    finished = False
    shortened = False

    def __init__(self, ids: Sequence[int], size: int) -> None:
        self._mask = torch.zeros(size, dtype=torch.bool)
        self._mask[list(ids)] = True

    def allowed(self, logits: Tensor | None = None) -> Tensor:
        """Token mask ``[V]`` (bool, CPU): the set."""
        return self._mask

    def legal(self) -> Tensor:
        """The same."""
        return self._mask

    def best(self, logits: Tensor, likeliest: int | None = None) -> int:
        """The most likely token of the set, by logits ``[V]``."""
        return argmax(logits.masked_fill(~self._mask.to(logits.device), -torch.inf))

    def forced(self) -> list[int]:
        """None: where the set has one token alone, its log-probability is the model's all the same."""
        return []

    def takes(self, token_id: int) -> bool:
        """Whether it is one of the set."""
        return bool(self._mask[token_id])

    def accept(self, token_id: int) -> None:
        """Every step has the same set."""

    def fork(self) -> Self:
        """Itself: there is no state."""
        return self
