"""Longrope (Phi-3-128k, Phi-3.5, Phi-4-mini): one set of factors for all sequences of a model.

Such a checkpoint has short factors for sequences up to the length it was first trained for, and long ones for its whole
window. transformers chooses anew at each forward, by the longest sequence in it: a conversation that grows past that
length, a prompt that is read in chunks or a longer neighbour in the batch would change what is in the KV already. Here
the context window decides, once, as in vLLM (``max_model_len``) and llama.cpp (``n_ctx``).
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

_log = logging.getLogger(__name__)

FIXED = "longrope, fixed"
"""Under this type transformers leaves a rotary embedding's frequencies as they are."""


@torch.no_grad()
def fix_long_rope(model: nn.Module, context_window: int, name: str) -> None:
    """Choose the factors of every rotary embedding with longrope; nothing on any other model.

    Args:
        model: a causal LM of transformers.
        context_window: tokens of the longest sequence.
        name: of the model, for the log.
    """
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if kind == "longrope":
            module.rope_type = FIXED  # type: ignore[assignment]
            _choose(module, None, context_window, name)
        elif isinstance(kind, dict) and "longrope" in kind.values():
            long = [layers for layers, each in kind.items() if each == "longrope"]
            module.rope_type = {**kind, **dict.fromkeys(long, FIXED)}  # type: ignore[assignment]
            for layers in long:
                _choose(module, layers, context_window, name)


def _choose(rotary: Any, layers: str | None, context_window: int, name: str) -> None:
    """Fill in the frequencies, of one type of layers where there are several."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = rotary.config.rope_parameters
    settings = settings if layers is None else settings[layers]
    original, prefix = settings["original_max_position_embeddings"], "" if layers is None else f"{layers}_"
    frequencies = getattr(rotary, f"{prefix}inv_freq")
    if context_window <= original:
        frequencies.copy_(getattr(rotary, f"{prefix}original_inv_freq"))
    elif "short_mscale" in settings:  # PhiMoE has the short frequencies always, and scales by the longest position
        settings["short_mscale"] = settings["long_mscale"]
    else:
        which = {} if layers is None else {"layer_type": layers}
        long, _ = ROPE_INIT_FUNCTIONS["longrope"](rotary.config, frequencies.device, seq_len=original + 1, **which)
        frequencies.copy_(long)
        _log.info(
            "%r reads all prompts with the factors for its window of %d tokens, also those of up to %d tokens.",
            *(name, context_window, original),
        )
