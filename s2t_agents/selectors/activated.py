"""The activated selector: a LoRA that is active only at the K candidate positions, over the base's KV cache.

    prefix (adapter off) ─ KV ─┬─ candidate 1 (adapter on) ─ hidden ─┐
                               ├─ ...                                ├─ log p_SLM + correction
                               └─ candidate K (adapter on) ─ hidden ─┘

One forward pass of K tokens, batched with steps and selections of other generations (``scheduling.scheduler``). The
correction starts at zero: an untrained selector is greedy decoding.
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
from .base import LearnedSelector
from .config import SelectorConfig

HEAD_FILE = "score_head.safetensors"


class ActivatedSelector(LearnedSelector):
    """Scores candidates with an adapter that does not change logits or KV of the base.

    Args:
        base: the SLM.
        lora: adapter on its linear layers, active at the candidates only.
        temperature, caution: see ``LearnedSelector``.
    """

    needs = ("candidate_scoring", "candidate_lora")

    def __init__(self, base: LanguageModel, lora: Lora, *, temperature: float = 1.0, caution: float = 0.0) -> None:
        super().__init__(base, temperature=temperature, caution=caution)
        self.lora = lora
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

    def save(self, path: Path, config: SelectorConfig) -> None:
        """Write a PEFT-compatible directory: adapter, score head, ``selector.json``."""
        self.lora.save(path, base_name=config.base.name)
        write_whole(path / HEAD_FILE, save({"weight": self.head.weight.detach().cpu().contiguous()}))
        config.save(path)

    @classmethod
    def load(cls, path: Path, base: LanguageModel, config: SelectorConfig) -> ActivatedSelector:
        """Read a directory written by ``save``.

        Raises:
            AdapterMismatch: trained for another base, or a file holds something else.
            UnsafeWeights: a file is not readable safetensors.
        """
        config.check_base(base)
        selector = cls(base, Lora.load(path, base.model), temperature=config.temperature, caution=config.caution)
        weight = read_tensors(path / HEAD_FILE).get("weight", torch.empty(0))
        if weight.shape != selector.head.weight.shape:
            raise AdapterMismatch(
                f"{path / HEAD_FILE} is {tuple(weight.shape)}, not {tuple(selector.head.weight.shape)}."
            )
        selector.head.weight.data = weight.float()
        return selector.to(base.device).requires_grad_(False)
