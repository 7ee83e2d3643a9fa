"""How a model with recurrent state goes on from its cache: some restart their state where a chunk meets it.

whole     1 .................... 32
in two    1 ............. 30 | 31 32      the same logits at the end, or chunks are not to be had
by one    1 ............. 30 | 31 | 32    the same logits, or the state is not in the cache: refused

Another sequence is read before the second part, so that a state that is kept in the modules shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ...errors import ConfigError
from .packed_batch import FAILURES

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
    first, last = ids[:, :-CHUNK], ids[:, -CHUNK:]
    try:
        whole = _read(model, ids, new_cache())
        parts = _after(model, first, [last], new_cache)
        singles = _after(model, first, last.split(1, dim=1), new_cache)
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        raise _refused(model, name) from error
    bound = CLOSE.get(model.dtype, CLOSE_IN_HALF) * (whole.max() - whole.min())
    if (whole - singles).abs().max() > bound:  # of a state that is not in its cache
        raise _refused(model, name)
    return bool((whole - parts).abs().max() <= bound)


def _after(model: Any, first: Tensor, rest: Sequence[Tensor], new_cache: Callable[[], Cache]) -> Tensor:
    """Logits ``[V]`` after some tokens and the rest of them, another sequence having been read in between."""
    cache, other = new_cache(), new_cache()
    _read(model, first, cache)
    _read(model, first.flip(1), other)
    for part in rest:
        logits = _read(model, part, cache)
    return logits


def _read(model: Any, part: Tensor, cache: Cache) -> Tensor:
    """Logits ``[V]`` after a part that goes on from a cache.

    Raises:
        ValueError: the cache does not count its tokens.
    """
    start = int(cache.get_seq_length())
    places = torch.arange(start, start + part.shape[1], device=part.device)[None]
    out = model(input_ids=part, position_ids=places, past_key_values=cache, use_cache=True, logits_to_keep=1)
    if int(cache.get_seq_length()) != start + part.shape[1]:
        raise ValueError(f"a cache of {start} tokens has {cache.get_seq_length()} after {part.shape[1]} more")
    logits: Tensor = out.logits[0, -1].float()
    return logits


def _refused(model: Any, name: str) -> ConfigError:
    return ConfigError(
        f"{name!r} ({model.config.model_type}) does not go on from a KV cache: a purely recurrent model, or one with a "
        "cache of its own or state in its modules.",
        hint="Use an attention model, or a hybrid such as Qwen3-Next, LFM2, Bamba or Jamba.",
    )
