"""The head selector: a small MLP on the SLM's last hidden state and each candidate's output embedding.

No extra forward pass of the base: score = log p_SLM + mlp([hidden, embedding(c)]), with the MLP zero at the start.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..atomic_write import write_whole
from ..backends.torch.loading import read_tensors
from ..errors import AdapterMismatch
from ..proposal import Proposal
from ..scheduling.language_model import LanguageModel
from ..scheduling.waits import Waiting
from .base import LearnedSelector
from .config import SelectorConfig

WEIGHTS_FILE = "head.safetensors"


class HeadSelector(LearnedSelector):
    """Scores candidates from the SLM's hidden state.

    Args:
        base: the SLM.
        width: hidden units of the MLP.
        temperature, caution: see ``LearnedSelector``.
    """

    needs = ("hidden_states",)

    def __init__(
        self, base: LanguageModel, *, width: int = 256, temperature: float = 1.0, caution: float = 0.0
    ) -> None:
        super().__init__(base, temperature=temperature, caution=caution)
        size = base.hidden_size
        self.from_hidden = nn.Linear(size, width)
        self.from_candidate = nn.Linear(size, width, bias=False)
        self.interaction = nn.Linear(width, width)
        self.out = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.out.weight)
        self.to(base.device)

    @torch.inference_mode()
    def scoring(self, proposal: Proposal) -> Waiting[Tensor]:
        """Waits for nothing."""
        correction = self.correction(proposal.hidden[None], proposal.candidates[None])[0]
        return self.calibrated(proposal.candidate_log_probs, correction)
        yield

    def correction(self, hidden: Tensor, candidates: Tensor) -> Tensor:
        """From hidden states ``[N, H]`` and candidate ids ``[N, K]`` to corrections ``[N, K]``."""
        embedded = self.base.output_embedding[candidates].float()
        embedded = embedded / embedded.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        state = self.from_hidden(hidden.float())[:, None]
        mixed = nn.functional.gelu(state + self.from_candidate(embedded))
        corrected: Tensor = self.out(nn.functional.gelu(self.interaction(mixed))).squeeze(-1)
        return corrected

    def save(self, path: Path, config: SelectorConfig) -> None:
        """Write ``head.safetensors`` and ``selector.json``."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        write_whole(path / WEIGHTS_FILE, save(tensors))
        config.save(path)

    @classmethod
    def load(cls, path: Path, base: LanguageModel, config: SelectorConfig) -> HeadSelector:
        """Read a directory written by ``save``; errors as ``LoraSelector.load``."""
        config.check_base(base)
        return cls.read(path, base, config)

    @classmethod
    def read(cls, path: Path, base: Any, config: SelectorConfig) -> HeadSelector:
        """As ``load``, for a base that the caller has compared with ``config``.

        Args:
            path: the directory.
            base: name, hidden_size, output_embedding and device, as a ``LanguageModel`` has them.
            config: of the selector.
        """
        tensors = read_tensors(path / WEIGHTS_FILE)
        try:
            width = tensors["out.weight"].shape[1]
            selector = cls(base, width=width, temperature=config.temperature, caution=config.caution)
            selector.load_state_dict(tensors)
        except (KeyError, IndexError, RuntimeError) as error:
            raise AdapterMismatch(f"{path / WEIGHTS_FILE} does not fit {base.name!r}: {error}.") from error
        return selector.requires_grad_(False)
