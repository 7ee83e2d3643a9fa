"""The adapted selector: the SLM reads along with a LoRA on, and its own log-probabilities then rank the candidates.

    prefix (adapter on, a KV of its own) ─ log-probabilities of the K candidates: their scores

No forward for the candidates: at a selection only the tokens since the last one are read. The base goes on proposing,
so nothing but its K candidates can be chosen. A fresh adapter changes nothing: untrained, this is greedy decoding.

Its file is in half precision; it computes in fp32.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..backends.torch.language_model import LanguageModel
from ..backends.torch.logit_statistics import FLOOR
from ..backends.torch.lora import Lora
from ..proposal import Proposal
from .adapted_prefix import AdaptedPrefixes
from .base import LearnedSelector
from .config import SelectorConfig


class AdaptedSelector(LearnedSelector):
    """Scores candidates by what the adapted SLM would say.

    Args:
        base: the SLM.
        lora: on for the prefix.
        temperature, caution: see ``LearnedSelector``.
    """

    def __init__(self, base: LanguageModel, lora: Lora, *, temperature: float = 1.0, caution: float = 0.0) -> None:
        super().__init__(base, temperature=temperature, caution=caution)
        self.lora = lora
        self.prefixes = AdaptedPrefixes(base, lora)
        self.to(base.device)

    @torch.inference_mode()
    def scores(self, proposal: Proposal) -> Tensor:
        """``[K]``, see ``calibrated``."""
        with self.prefixes.caught_up(proposal) as prefix:
            logits = prefix.logits
        slm = proposal.candidate_log_probs
        return self.calibrated(slm, self.correction(slm, logits, proposal.candidates))

    def correction(self, slm: Tensor, logits: Tensor, candidates: Tensor) -> Tensor:
        """What the adapter changes: 0 for illegal candidates, which stay so.

        Args:
            slm: ``[..., K]``, the candidates' log-probabilities without it.
            logits: ``[..., V]``, with it.
            candidates: ``[..., K]``.
        """
        adapted = logits.log_softmax(-1).gather(-1, candidates)
        return torch.where(slm > FLOOR, adapted - slm, 0.0)

    def save(self, path: Path, config: SelectorConfig) -> None:
        """Write a PEFT-compatible directory: adapter, ``selector.json``."""
        self.lora.save(path, base_name=config.base.name, dtype=torch.float16)
        config.save(path)

    @classmethod
    def load(cls, path: Path, base: LanguageModel, config: SelectorConfig) -> AdaptedSelector:
        """Read a directory written by ``save``; errors as ``ActivatedSelector.load``."""
        config.check_base(base)
        lora = Lora.load(path, base.model).float()
        selector = cls(base, lora, temperature=config.temperature, caution=config.caution)
        return selector.to(base.device).requires_grad_(False)
