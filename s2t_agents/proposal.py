"""The SLM's proposal at one step, which triggers and selectors read: masked logits, top-K candidates, statistics."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from .backends.statistics import FLOOR, statistics_at
from .greedy import argmax
from .scheduling.sequence import TokenSequence


class Proposal:
    """The top-K legal tokens after a prefix, with entropy and margin.

    Args:
        prefix: the sequence; read-only here.
        k: number of candidates; fewer if fewer are legal.
        allowed: ``[V]`` bool, the grammar's token mask; None permits all.
        banned: token ids that are illegal at this step.

    Attributes:
        logits: ``[V]`` fp32, illegal tokens at -inf.
        candidates: ``[K]`` token ids, best first.
    """

    def __init__(
        self, prefix: TokenSequence, k: int, *, allowed: Tensor | None = None, banned: Sequence[int] = ()
    ) -> None:
        self.prefix = prefix
        self.logits = prefix.logits
        if allowed is not None:
            self.logits = self.logits.masked_fill(~allowed.to(self.logits.device), -torch.inf)
        if banned:
            self.logits = self.logits.index_fill(0, torch.tensor(banned, device=self.logits.device), -torch.inf)
        self._k, self._all_legal = k, allowed is None and not banned
        self._seen = prefix.statistics if self._all_legal else None

    def fetch(self) -> None:
        """On CUDA, compute best token, entropy and margin in one transfer; elsewhere each is computed on access."""
        if self._seen is None and self.logits.device.type == "cuda":
            self._seen = statistics_at(self.logits)
        if self._seen is not None:
            self.best, self.entropy, self.margin = self._seen.best, self._seen.entropy, self._seen.margin

    @cached_property
    def best(self) -> int:
        """The SLM's most likely legal token."""
        return self._seen.best if self._seen is not None else argmax(self.logits)

    @cached_property
    def candidates(self) -> Tensor:
        """``[K]`` token ids, best first."""
        values, indices = best_first(self.logits, self._k)
        if self._all_legal and self.logits.device.type == "cuda":  # the comparison would synchronize the device
            return indices
        return indices[values > -torch.inf]

    @cached_property
    def log_probs(self) -> Tensor:
        """``[V]`` log-probabilities over the legal tokens."""
        return self.logits.log_softmax(0)

    @property
    def reported_log_probs(self) -> Tensor:
        """``[V]`` log-probabilities that the caller gets: normalised over the legal tokens.

        Where only a server's best tokens are known, and all of them are legal: the server's, over the whole vocabulary.
        """
        known = self.prefix.logits
        of_all = not self.prefix.model.capabilities.all_logits and torch.equal(self.logits, known)
        return known if of_all else self.log_probs

    @cached_property
    def candidate_log_probs(self) -> Tensor:
        """``[K]``: log p_SLM of the candidates."""
        return self.log_probs[self.candidates]

    @property
    def hidden(self) -> Tensor:
        """``[H]``: the SLM's last hidden state at this step.

        Raises:
            ConfigError: the backend gives none.
        """
        self.prefix.model.require("hidden_states")
        return self.prefix.hidden

    @cached_property
    def entropy(self) -> float:
        """Entropy of the next-token distribution, in nats."""
        return float(entropy_of(self.log_probs))

    @cached_property
    def margin(self) -> float:
        """Probability of the best token minus that of the second, in [0, 1]; 1 if only one is legal."""
        best = self.candidate_log_probs[:2].exp().tolist()
        return best[0] - best[1] if len(best) > 1 else 1.0


def best_first(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Top-K of ``[..., V]`` in which the first of equal scores is the one that greedy decoding takes.

    Args:
        scores: logits, or log-probabilities.
        k: number of tokens; at most V are returned.

    Returns:
        Values and token ids, both ``[..., K]``. Never synchronizes the device.
    """
    values, indices = scores.topk(min(k, scores.shape[-1]))  # its order of ties is arbitrary
    first = scores.argmax(-1, keepdim=True)
    rest = torch.where(indices == first, indices[..., :1], indices)[..., 1:]
    return values, torch.cat([first, rest], -1)


def entropy_of(log_probs: Tensor) -> Tensor:
    """Entropy in nats, from log-probabilities ``[..., V]`` to ``[...]``; illegal tokens (-inf) add nothing."""
    # No second logarithm, and no exp() of its own: MKL's would start threads for it (see backends/cpu_threads.py).
    return -(log_probs.softmax(-1) * log_probs.clamp_min(FLOOR)).sum(-1)
