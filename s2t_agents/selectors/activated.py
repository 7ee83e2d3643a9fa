"""The activated selector: a LoRA that is active only at the K candidate positions, over the base's KV cache.

    prefix (adapter off) ─ KV ─┬─ candidate 1 (adapter on) ─ hidden ─┐
                               ├─ ...                                ├─ log p_SLM + correction
                               └─ candidate K (adapter on) ─ hidden ─┘

One forward pass of K tokens, batched with steps and selections of other generations (``scheduling.scheduler``). The
correction starts at zero: an untrained selector is greedy decoding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..backends.torch.lora import Lora
from ..proposal import Proposal
from ..scheduling.language_model import LanguageModel
from ..scheduling.waits import Waiting
from .lora_selector import LoraSelector


class ActivatedSelector(LoraSelector):
    """Scores candidates with an adapter that does not change logits or KV of the base.

    Args:
        base: the SLM.
        lora: adapter on its linear layers, active at the candidates only.
        temperature, caution: see ``LearnedSelector``.
    """

    needs = ("candidate_scoring", "candidate_lora")
    scorer = "head"

    def __init__(self, base: LanguageModel, lora: Lora, *, temperature: float = 1.0, caution: float = 0.0) -> None:
        super().__init__(base, lora, temperature=temperature, caution=caution)
        self.head = nn.Linear(base.hidden_size, 1, bias=False)
        nn.init.zeros_(self.head.weight)
        self.to(base.device)

    @torch.inference_mode()
    def scoring(self, proposal: Proposal) -> Waiting[Tensor]:
        """``[K]``, see ``calibrated``."""
        hidden = yield from proposal.prefix.scoring_candidates(proposal.candidates, self.lora)
        return self.calibrated(proposal.candidate_log_probs, self.correction(hidden))

    def correction(self, hidden: Tensor) -> Tensor:
        """From adapted hidden states ``[..., H]`` to corrections ``[...]``."""
        corrected: Tensor = self.head(hidden.float()).squeeze(-1)
        return corrected
