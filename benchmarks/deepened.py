"""A large model made larger without changing what it says: layers are added that add exactly nothing.

The bundled large model is three times the small one; real pairs are further apart (Qwen2.5 1.5B and 32B: 21 times).
Layers whose output projections are zero leave the residual stream as it is, to the bit: the same tokens
at the cost of a model of the wanted size.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from s2t_agents.errors import ConfigError
from s2t_agents.scheduling.language_model import LanguageModel

REAL_RATIO = 21.0
"""Parameters of Qwen2.5-32B over those of Qwen2.5-1.5B."""


def parameters(model: LanguageModel) -> int:
    """How many there are, tied ones once."""
    return int(model.model.num_parameters())


@torch.no_grad()
def deepened(model: LanguageModel, wanted: int) -> LanguageModel:
    """A model that says the same with about ``wanted`` parameters.

    Raises:
        ConfigError: it has more than that already, or its layers are not of the Llama pattern.
    """
    layers: Any = model.torch_backend.decoder.layers
    last = layers[-1]
    size = sum(p.numel() for p in last.parameters())
    extra = round((wanted - parameters(model)) / size)
    if extra < 0 or not hasattr(last, "self_attn") or not hasattr(last.self_attn, "o_proj"):
        raise ConfigError(f"{model.name!r} with {parameters(model)} parameters cannot be deepened to {wanted}.")
    config = copy.deepcopy(model.model.config)
    config.num_hidden_layers = len(layers) + extra
    if getattr(config, "layer_types", None):
        config.layer_types = [*config.layer_types, *[config.layer_types[-1]] * extra]
    with torch.random.fork_rng():
        twin = type(model.model)(config).to(device=model.device, dtype=model.model.dtype)
    twin.load_state_dict(model.model.state_dict(), strict=False)
    for block in twin.get_decoder().layers[len(layers) :]:
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    twin.eval().requires_grad_(False)
    return type(model)(twin, model.tokenizer, name=f"{model.name}, deepened")
