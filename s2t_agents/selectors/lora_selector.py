"""What selectors with a LoRA share: the adapter, the layer that scores what it computes, and their directory."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

import torch
from safetensors.torch import save

from ..atomic_write import write_whole
from ..backends.torch.loading import read_tensors
from ..backends.torch.lora import Lora
from ..errors import AdapterMismatch
from ..scheduling.language_model import LanguageModel
from .base import LearnedSelector
from .config import SelectorConfig


class LoraSelector(LearnedSelector):
    """Scores candidates with an adapter on the SLM.

    Args:
        base: the SLM.
        lora: adapter on its linear layers.
        temperature, caution: see ``LearnedSelector``.

    Attributes:
        scorer: the layer that is trained beside the adapter, in a file of its name; None where there is none.
        stored_as: dtype of the adapter's file, which is read back as fp32; None stores and reads it as it is.
    """

    scorer: ClassVar[str | None] = None
    stored_as: ClassVar[torch.dtype | None] = None

    def __init__(self, base: LanguageModel, lora: Lora, *, temperature: float = 1.0, caution: float = 0.0) -> None:
        super().__init__(base, temperature=temperature, caution=caution)
        self.lora = lora
        self.to(base.device)

    def save(self, path: Path, config: SelectorConfig) -> None:
        """Write a PEFT-compatible directory: adapter, scorer, ``selector.json``."""
        self.lora.save(path, base_name=config.base.name, dtype=self.stored_as)
        if self.scorer is not None:
            weight = self.get_parameter(f"{self.scorer}.weight").detach().cpu().contiguous()
            write_whole(path / f"score_{self.scorer}.safetensors", save({"weight": weight}))
        config.save(path)

    @classmethod
    def load(cls, path: Path, base: LanguageModel, config: SelectorConfig) -> Self:
        """Read a directory written by ``save``.

        Raises:
            AdapterMismatch: trained for another base, or a file holds something else.
            UnsafeWeights: a file is not readable safetensors.
        """
        config.check_base(base)
        lora = Lora.load(path, base.model)
        if cls.stored_as is not None:
            lora = lora.float()
        selector = cls(base, lora, temperature=config.temperature, caution=config.caution)
        if cls.scorer is not None:
            file, wanted = path / f"score_{cls.scorer}.safetensors", selector.get_parameter(f"{cls.scorer}.weight")
            found = read_tensors(file).get("weight", torch.empty(0))
            if found.shape != wanted.shape:
                raise AdapterMismatch(f"{file} is {tuple(found.shape)}, not {tuple(wanted.shape)}.")
            wanted.data = found.float()
        return selector.to(base.device).requires_grad_(False)
