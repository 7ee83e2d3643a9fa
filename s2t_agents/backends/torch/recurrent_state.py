"""How a model with recurrent state goes on from its cache: some restart their state where a chunk meets it.

whole     1 .................... 32
in two    1 ............. 30 | 31 32      the same logits at the end, or chunks are not to be had
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ...errors import ConfigError

TOKENS, CHUNK = 32, 2
"""Of the trial, and how many of them are its second part."""

CLOSE = {torch.float32: 1e-4}
"""Largest difference between both ways, as a share of the logits' range, by dtype."""

CLOSE_IN_HALF = 6e-3
"""The same in half precision, whose rounding depends on the way."""


def keeps_a_cache(model: Any) -> bool:
    """Whether its forward takes a cache at all; some keep their state elsewhere."""
    return "past_key_values" in signature(model.forward).parameters


@torch.inference_mode()
def resumes_in_chunks(model: Any, new_cache: Callable[[], Cache], name: str) -> bool:
    """Whether several tokens after a cache are read as they are in one go; by a trial.

    Args:
        model: a causal LM.
        new_cache: makes an empty one.
        name: of the model, for the error.

    Raises:
        ConfigError: it does not go on from a cache.
    """
    ids = (7 * torch.arange(1, TOKENS + 1, device=model.device) % 251)[None]
    ids = ids % model.get_input_embeddings().weight.shape[0]
    try:
        whole, _ = _read(model, [ids], new_cache())
        parts, length = _read(model, [ids[:, :-CHUNK], ids[:, -CHUNK:]], new_cache())
    except (AttributeError, TypeError, ValueError) as error:
        raise _refused(model, name) from error
    if length != TOKENS:
        raise _refused(model, name)
    bound = CLOSE.get(model.dtype, CLOSE_IN_HALF)
    return bool((whole - parts).abs().max() <= bound * (whole.max() - whole.min()))


def _read(model: Any, parts: Sequence[Tensor], cache: Cache) -> tuple[Tensor, int]:
    """Logits ``[V]`` after the last part, and the number of tokens that the cache then reports."""
    start = 0
    for part in parts:
        places = torch.arange(start, start + part.shape[1], device=part.device)[None]
        out = model(input_ids=part, position_ids=places, past_key_values=cache, use_cache=True, logits_to_keep=1)
        start += part.shape[1]
    return out.logits[0, -1].float(), int(cache.get_seq_length())


def _refused(model: Any, name: str) -> ConfigError:
    return ConfigError(
        f"{name!r} ({model.config.model_type}) does not go on from a KV cache: a purely recurrent model, or one with a "
        "cache of its own.",
        hint="Use an attention model, or a hybrid such as Qwen3-Next, LFM2, Bamba or Jamba.",
    )
