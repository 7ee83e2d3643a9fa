"""The adapted selector: the SLM with a LoRA active on the prefix, whose log-probabilities rank the candidates.

    prefix (adapter on, a KV of its own) ─ log-probabilities of the K candidates: their scores

No forward pass for the candidates: a selection prefills only the tokens since the last one. Candidates are the base's,
so only its top K can be chosen. A new adapter changes nothing: untrained, this is greedy decoding.

Its file is in half precision; it computes in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.statistics import FLOOR
from ..backends.torch.lora import Lora
from ..proposal import Proposal
from ..scheduling.language_model import LanguageModel
from ..scheduling.waits import Waiting
from .adapted_prefix import AdaptedPrefixes
from .lora_selector import LoraSelector


class AdaptedSelector(LoraSelector):
    """Scores candidates by the adapted SLM's log-probabilities.

    Args:
        base: the SLM.
        lora: active on the prefix.
        temperature, caution: see ``LearnedSelector``.
    """

    needs = ("candidate_lora",)
    stored_as = torch.float16

    def __init__(self, base: LanguageModel, lora: Lora, *, temperature: float = 1.0, caution: float = 0.0) -> None:
        super().__init__(base, lora, temperature=temperature, caution=caution)
        self.prefixes = AdaptedPrefixes(base, lora)

    @torch.inference_mode()
    def scoring(self, proposal: Proposal) -> Waiting[Tensor]:
        """``[K]``, see ``calibrated``."""
        prefix = yield from self.prefixes.caught_up(proposal)
        logits = prefix.logits
        self.prefixes.idle.put(prefix)
        slm = proposal.candidate_log_probs
        return self.calibrated(slm, self.correction(slm, logits, proposal.candidates))

    def correction(self, slm: Tensor, logits: Tensor, candidates: Tensor) -> Tensor:
        """Difference of the log-probabilities with and without the adapter, ``[..., K]``; 0 for illegal candidates.

        Args:
            slm: ``[..., K]``, the candidates' log-probabilities without it.
            logits: ``[..., V]``, with it.
            candidates: ``[..., K]``.
        """
        adapted = logits.log_softmax(-1).gather(-1, candidates)
        return torch.where(slm > FLOOR, adapted - slm, 0.0)
