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

from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..atomic_write import write_whole
from ..backends.torch.loading import read_tensors
from ..backends.torch.lora import Lora
from ..errors import AdapterMismatch
from ..proposal import Proposal
from ..scheduling.language_model import LanguageModel
from ..scheduling.waits import Waiting
from .adapted_prefix import AdaptedPrefixes
from .base import LearnedSelector
from .config import SelectorConfig

ROWS_FILE = "score_rows.safetensors"
BINS = 16
SPAN = 24.0
"""Nats between the lowest and the highest bin: enough to overrule any order of the SLM's candidates."""


class PublishedSelector(LearnedSelector):
    """Scores candidates with an adapter that is active on the prefix as well.

    Args:
        base: the SLM.
        lora: active on prefix and candidates.
        temperature, caution: see ``LearnedSelector``.
    """

    needs = ("candidate_scoring", "candidate_lora")
    bins: Tensor

    def __init__(self, base: LanguageModel, lora: Lora, *, temperature: float = 1.0, caution: float = 0.0) -> None:
        super().__init__(base, temperature=temperature, caution=caution)
        self.lora = lora
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

    def save(self, path: Path, config: SelectorConfig) -> None:
        """Write a PEFT-compatible directory: adapter, score rows, ``selector.json``."""
        self.lora.save(path, base_name=config.base.name)
        write_whole(path / ROWS_FILE, save({"weight": self.rows.weight.detach().cpu().contiguous()}))
        config.save(path)

    @classmethod
    def load(cls, path: Path, base: LanguageModel, config: SelectorConfig) -> PublishedSelector:
        """Read a directory written by ``save``; errors as ``ActivatedSelector.load``."""
        config.check_base(base)
        selector = cls(base, Lora.load(path, base.model), temperature=config.temperature, caution=config.caution)
        weight = read_tensors(path / ROWS_FILE).get("weight", torch.empty(0))
        if weight.shape != selector.rows.weight.shape:
            raise AdapterMismatch(
                f"{path / ROWS_FILE} is {tuple(weight.shape)}, not {tuple(selector.rows.weight.shape)}."
            )
        selector.rows.weight.data = weight.float()
        return selector.to(base.device).requires_grad_(False)
