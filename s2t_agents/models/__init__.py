"""Weights, tokenizer, KV cache and the read-only overlay: the one place that knows transformers' internals."""

from .language_model import LanguageModel
from .lora import Lora
from .prefix import Prefix

__all__ = ["LanguageModel", "Lora", "Prefix"]
