"""What the small model proposes at one step: the view that triggers and selectors read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from .backends.torch.logit_statistics import FLOOR, glance_at
from .scheduling.sequence import Prefix


class Proposal:
    """The K best legal tokens after a prefix, and how sure the SLM is of them.

    Args:
        prefix: read-only here.
        k: how many candidates; fewer when fewer are legal.
        allowed: ``[V]`` bool, the tokens that the grammar permits; None permits all.
        banned: token ids that cannot be chosen at this step.

    Attributes:
        logits: ``[V]`` fp32, illegal tokens at -inf.
        candidates: ``[K]`` token ids, best first.
    """

    def __init__(self, prefix: Prefix, k: int, *, allowed: Tensor | None = None, banned: Sequence[int] = ()) -> None:
        self.prefix = prefix
        self.logits = prefix.logits
        if allowed is not None:
            self.logits = self.logits.masked_fill(~allowed.to(self.logits.device), -torch.inf)
        if banned:
            self.logits = self.logits.index_fill(0, torch.tensor(banned, device=self.logits.device), -torch.inf)
        self._k, self._all_legal = k, allowed is None and not banned
        self._seen = prefix.glance if self._all_legal else None

    def fetch(self) -> None:
        """Bring best token, entropy and margin from CUDA in one trip; elsewhere each is made when it is read."""
        if self._seen is None and self.logits.device.type == "cuda":
            self._seen = glance_at(self.logits)
        if self._seen is not None:
            self.__dict__.update(vars(self._seen))

    @cached_property
    def best(self) -> int:
        """The token that the SLM wants most."""
        return self._seen.best if self._seen is not None else int(self.logits.argmax())

    @cached_property
    def candidates(self) -> Tensor:
        """``[K]`` token ids, best first."""
        values, indices = best_first(self.logits, self._k)
        if self._all_legal and self.logits.device.type == "cuda":  # to compare is to wait for the device
            return indices
        return indices[values > -torch.inf]

    @cached_property
    def log_probs(self) -> Tensor:
        """``[V]`` log-probabilities over the legal tokens."""
        return self.logits.log_softmax(0)

    @cached_property
    def candidate_log_probs(self) -> Tensor:
        """``[K]``: log p_SLM of the candidates."""
        return self.log_probs[self.candidates]

    @property
    def hidden(self) -> Tensor:
        """``[H]``: the SLM's last hidden state at this step."""
        return self.prefix.hidden

    @cached_property
    def entropy(self) -> float:
        """Of the next-token distribution, in nats."""
        return float(entropy_of(self.log_probs))

    @cached_property
    def margin(self) -> float:
        """Probability of the best token minus that of the second, in [0, 1]; 1 when only one is legal."""
        best = self.candidate_log_probs[:2].exp().tolist()
        return best[0] - best[1] if len(best) > 1 else 1.0


def best_first(scores: Tensor, k: int, best: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The K highest of ``[..., V]``, and the one that greedy decoding takes before all that equal it.

    Args:
        scores: logits, or log-probabilities.
        k: at most V are given.
        best: ``[...]``, what greedy decoding takes where it is known; the first of the highest by default.

    Returns:
        Values and token ids, both ``[..., K]``. Never waits for the device.
    """
    values, indices = scores.topk(min(k, scores.shape[-1]))  # which breaks ties in an order of its own
    first = (scores.argmax(-1) if best is None else best)[..., None]
    rest = torch.where(indices == first, indices[..., :1], indices)[..., 1:]
    return values, torch.cat([first, rest], -1)


def entropy_of(log_probs: Tensor) -> Tensor:
    """Nats, from ``[..., V]`` to ``[...]``; what is illegal (-inf) adds nothing."""
    # No second logarithm, and no exp() of its own: MKL's would start threads for it (see torch/cpu_threads.py).
    return -(log_probs.softmax(-1) * log_probs.clamp_min(FLOOR)).sum(-1)
