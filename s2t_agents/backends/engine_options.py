"""Options of a model (``model_kwargs``) by the engine that takes them, and the error for one that it does not know."""

from __future__ import annotations

from difflib import get_close_matches

from ..errors import ConfigError
from ..hub import HUB_OPTIONS, REPOSITORY_OPTIONS
from .completions.backend import SCHEME, ServerOptions
from .llamacpp.context import Options

CHECKPOINT_OPTIONS = frozenset({
    *HUB_OPTIONS, *REPOSITORY_OPTIONS,
    "attn_implementation", "device_map", "experts_implementation", "gguf_file", "key_mapping", "max_memory",
    "offload_buffers", "offload_folder", "prepack", "quantization_config", "tokenizer", "tp_plan", "variant",
})  # fmt: skip
"""The usual ones: ``from_pretrained`` also takes every attribute of the model's config."""

LLAMACPP_OPTIONS = frozenset(Options.__dataclass_fields__)
SERVER_OPTIONS = frozenset(ServerOptions.__dataclass_fields__)


def unknown_option(name: str, model: str) -> ConfigError:
    """The error for an option that ``from_pretrained`` does not take: who does, or which may have been meant."""
    close = get_close_matches(name, CHECKPOINT_OPTIONS, n=1)
    if name in LLAMACPP_OPTIONS:
        way_out = "llama.cpp takes it, for GGUF files: leave it out."
    elif name in SERVER_OPTIONS:
        way_out = f"It is for a model on a server ({SCHEME}host:port/name): leave it out."
    else:
        way_out = f"Did you mean {close[0]}?" if close else "Leave it out, or check its name in transformers."
    return ConfigError(f"from_pretrained takes no {name} for {model!r}, a checkpoint in PyTorch.", hint=way_out)
