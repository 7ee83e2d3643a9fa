"""The published selector: LoRA on the prefix too, and a score read off reserved rows ("expected bin").

    prefix (adapter on, a KV of its own) ─┬─ candidate 1 (adapter on) ─ hidden ─┐
                                          ├─ ...                                ├─ log p_SLM + correction
                                          └─ candidate K (adapter on) ─ hidden ─┘

The correction is span * (v . softmax(z) - 1/2), z being R rows of scores and v evenly spaced bins.

For comparison, and for servers without activated LoRA. The paper re-encodes the prefix for every candidate; here the
adapted KV cache is kept and extended (Ye et al. 2026, section 4; arXiv 2604.26940). Zero-initialised rows give every
bin the same weight, so it starts as greedy decoding too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..backends.torch.lora import Lora
from ..proposal import Proposal
from ..scheduling.language_model import LanguageModel
from ..scheduling.waits import Waiting
from .adapted_prefix import AdaptedPrefixes
from .lora_selector import LoraSelector

BINS = 16
SPAN = 24.0
"""Nats between the lowest and the highest bin: enough to overrule any order of the SLM's candidates."""


class PublishedSelector(LoraSelector):
    """Scores candidates with an adapter that is active on the prefix as well.

    Args:
        base: the SLM.
        lora: active on prefix and candidates.
        temperature, caution: see ``LearnedSelector``.
    """

    needs = ("candidate_scoring", "candidate_lora")
    scorer = "rows"
    bins: Tensor

    def __init__(self, base: LanguageModel, lora: Lora, *, temperature: float = 1.0, caution: float = 0.0) -> None:
        super().__init__(base, lora, temperature=temperature, caution=caution)
        self.rows = nn.Linear(base.hidden_size, BINS, bias=False)
        nn.init.zeros_(self.rows.weight)
        self.register_buffer("bins", torch.linspace(0, 1, BINS), persistent=False)
        self.prefixes = AdaptedPrefixes(base, lora)
        self.to(base.device)

    @torch.inference_mode()
    def scoring(self, proposal: Proposal) -> Waiting[Tensor]:
        """``[K]``, see ``calibrated``."""
        prefix = yield from self.prefixes.caught_up(proposal)
        hidden = yield from prefix.scoring_candidates(proposal.candidates, self.lora)
        self.prefixes.idle.put(prefix)
        return self.calibrated(proposal.candidate_log_probs, self.correction(hidden))

    def correction(self, hidden: Tensor) -> Tensor:
        """From adapted hidden states ``[..., H]`` to corrections ``[...]``."""
        expected: Tensor = self.rows(hidden.float()).softmax(-1) @ self.bins
        return SPAN * (expected - 0.5)
