"""A head selector as an operation on a batch's logits: how it runs inside a server that samples by itself.

logits [N, V] ── trigger ──> rows that are sure: as they are
                             rows that are not:  the K candidates share their probability by the selector's scores;
                                                 all other tokens are put ``OUT_OF_REACH`` below

The same numbers tell a client, in the log-probabilities that any server reports, which steps were triggered and which
token the small model alone would have taken: by how much the others were lowered (``endpoints.served_selection``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..endpoints.served_selection import A_PLACE, OUT_OF_REACH
from ..proposal import best_first, entropy_of
from .head import HeadSelector


class BatchTrigger(Protocol):
    """Which of N rows are triggered."""

    def __call__(self, hidden: Tensor, entropy: Tensor) -> Tensor:
        """From hidden states ``[N, H]`` and entropies ``[N]`` (nats) to ``[N]`` bool."""
        ...


@dataclass(frozen=True)
class EntropyAbove:
    """``triggers.entropy`` for rows."""

    nats: float

    def __call__(self, hidden: Tensor, entropy: Tensor) -> Tensor:
        """``[N]`` bool."""
        return entropy >= self.nats


@dataclass(frozen=True)
class ProbeAbove:
    """``triggers.probe`` for rows.

    Attributes:
        weight: ``[H + 1]``, the entropy's last.
        bias: added before the sigmoid.
        threshold: a probability.
    """

    weight: Tensor
    bias: float
    threshold: float

    def __call__(self, hidden: Tensor, entropy: Tensor) -> Tensor:
        """``[N]`` bool."""
        weight = self.weight.to(hidden.device)
        logit = hidden.float() @ weight[:-1] + entropy * weight[-1] + self.bias
        return logit.sigmoid() >= self.threshold


class LogitSelection:
    """Applies a head selector to logits.

    Args:
        selector: scores candidates.
        trigger: chooses the rows.
        k: candidates, at most ``MOST_CANDIDATES``.
    """

    def __init__(self, selector: HeadSelector, trigger: BatchTrigger, k: int) -> None:
        self._selector, self._trigger, self._k = selector, trigger, k

    @torch.inference_mode()
    def __call__(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """From hidden states ``[N, H]`` and logits ``[N, V]`` to logits ``[N, V]`` fp32, the candidates re-ranked.

        Rows that are not triggered stay as they are. On CUDA nothing waits for the device.
        """
        logits = logits.float()
        log_probs = logits.log_softmax(-1)
        triggered = self._trigger(hidden, entropy_of(log_probs))
        if logits.device.type == "cuda":
            return torch.where(triggered[:, None], self._selected(hidden, log_probs), logits)
        rows = triggered.nonzero()[:, 0]
        if not len(rows):
            return logits
        return logits.index_put((rows,), self._selected(hidden[rows], log_probs[rows]))

    def _selected(self, hidden: Tensor, log_probs: Tensor) -> Tensor:
        values, candidates = best_first(log_probs, self._k)
        scores = self._selector.calibrated(values, self._selector.correction(hidden, candidates)).to(log_probs)
        place = (scores > scores[:, :1]).sum(-1, keepdim=True)
        lowered = log_probs - OUT_OF_REACH - A_PLACE * place
        shared = scores.log_softmax(-1) + values.logsumexp(-1, keepdim=True)
        return lowered.scatter(-1, candidates, shared)
