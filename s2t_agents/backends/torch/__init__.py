"""Hugging Face checkpoints on PyTorch: weights, KV cache, attention, candidate scoring, LoRA."""

from .language_model import LanguageModel
from .lora import Lora

__all__ = ["LanguageModel", "Lora"]
