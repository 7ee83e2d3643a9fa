"""Models to measure on: the bundled one, and real shapes with random weights (speed does not depend on the values)."""

from __future__ import annotations

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.testing import tiny_config, tiny_tokenizer

from . import assets

QWEN_HALF_B: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}
"""Qwen2.5-0.5B, its whole vocabulary included."""

QWEN_ONE_AND_A_HALF_B: dict[str, Any] = {
    **QWEN_HALF_B,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
}
"""Qwen2.5-1.5B: for a GPU."""

SHAPES = {
    "qwen2.5-0.5b": QWEN_HALF_B,
    "qwen2.5-1.5b": QWEN_ONE_AND_A_HALF_B,
    "tiny": {"max_position_embeddings": 4096},
}

TEMPLATE = Path(__file__).parent / "demo_pair" / "chat_template.jinja"


def measured_model(name: str, *, dtype: torch.dtype, device: str = "cpu") -> LanguageModel:
    """A model of ``SHAPES`` with random weights, or the bundled one; it never ends an answer by itself.

    Shapes of Qwen's vocabulary have its tokenizer where the cache has that (`make real`), so that a grammar costs what
    it does over as many tokens; else they have one of bytes.

    Args:
        name: a key of ``SHAPES``, or a path or bundled name.
        dtype: of a random model's weights.
        device: where it runs.
    """
    if name not in SHAPES:
        loaded = LanguageModel.load(name, device=device)
        raw, tokenizer = loaded.model, copy.deepcopy(loaded.tokenizer)
    else:
        from transformers import AutoModelForCausalLM

        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)
            raw = AutoModelForCausalLM.from_config(tiny_config("qwen2", **SHAPES[name]))
        raw, tokenizer = raw.to(device=device, dtype=dtype).eval().requires_grad_(False), tokenizer_of(name)
        raw.get_input_embeddings().weight[tokenizer.pad_token_id] = 0  # never the largest logit
    tokenizer.eos_token = tokenizer.pad_token  # a grammar needs an end, and no model says this one
    raw.generation_config.eos_token_id = None
    model = LanguageModel(raw, tokenizer, name=name)
    if name in SHAPES:
        model.with_text = None  # random weights say nothing anyway
    return model


def tokenizer_of(shape: str) -> Any:
    """A tokenizer for a shape, with a chat template that shows tools; see ``measured_model``."""
    if "vocab_size" in SHAPES[shape]:
        with suppress(assets.Unavailable):
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(assets.folder("qwen3"))
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
    return tokenizer


def precision_of(model: LanguageModel) -> str:
    """Of its weights: a dtype, or the types of a GGUF file."""
    return str(model.model.dtype).removeprefix("torch.") if model.library == "torch" else model.quantization


def random_prompt(model: LanguageModel, length: int, seed: int = 0) -> list[int]:
    """So many token ids."""
    top = min(model.vocab_size, 1000)
    return torch.randint(10, min(top, 250), (length,), generator=torch.Generator().manual_seed(seed)).tolist()
