"""The stack of layers of a causal LM, without its output layer."""

from __future__ import annotations

from typing import Any

from torch import nn


def text_decoder(model: Any) -> nn.Module:
    """What ``get_decoder`` of transformers stands for.

    Of some models (Llama 4, Mllama) that gives the causal LM itself, of one (ModernBERT's decoder) the output layer.
    """
    head, decoder = model.get_output_embeddings(), model.get_decoder()
    if decoder is head:
        decoder = model
    while isinstance(inner := getattr(decoder, "model", None), nn.Module) and _within(head, decoder):
        decoder = inner
    found: nn.Module = decoder
    return found


def _within(module: nn.Module, outer: nn.Module) -> bool:
    return any(each is module for each in outer.modules())
