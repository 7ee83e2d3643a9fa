"""A head selector inside vLLM, as a plugin: ``S2T_SELECTOR=folder vllm serve MODEL``.

Environment variables, read where the server starts:

    S2T_SELECTOR    folder of a head selector for this model (``s2t train --kind head``); without it nothing changes
    S2T_TRIGGER     nats of entropy from which a step is triggered; the selector's calibrated trigger by default
    S2T_K           candidates, 2 to 16; the selector's by default

The plugin replaces vLLM's model classes of the families below by subclasses whose ``compute_logits`` re-ranks the
candidates (``selectors/in_logits.py``): batched, whatever the quantization, the sampling, the prefix cache. It comes
before the grammar of structured outputs, so the K candidates are those of the whole vocabulary.

Entry point ``vllm.general_plugins``; vLLM loads it in all of its processes.
"""

from __future__ import annotations

import os

MODELS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM")
"""Families that selectors exist for, by their classes' names."""


def register() -> None:
    """Tell vLLM of the classes; it imports the one that it needs when it builds the model."""
    if not os.environ.get("S2T_SELECTOR"):
        return
    from vllm import ModelRegistry

    for name in MODELS:
        ModelRegistry.register_model(name, f"{__package__}.vllm_models:{name}")
