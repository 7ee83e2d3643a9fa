"""Activations of decoder layers computed again in the backward pass, instead of kept: less memory, more time.

transformers' own gradient checkpointing runs without a KV cache, but here gradients flow through one. So every layer
is checkpointed from outside, and its replay differs from its first run in two ways only:

* it appends to a copy of the cache as the first run found it, so that the cache grows once;
* the adapter is switched on for it, because the ``with lora.on(...)`` block has ended by then.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicLayer

from ..backends.torch.lora import Lora


@contextmanager
def recomputed(base: nn.Module, decoder: nn.Module, lora: Lora) -> Iterator[None]:
    """Inside the block, what layers compute with gradients is not kept but computed again.

    Enter it inside ``with lora.on(base)``, and call ``backward`` after that block: a replay inside of it would meet the
    adapter twice.

    Args:
        base: the causal LM that ``lora`` names layers of.
        decoder: its stack of layers.
        lora: the adapter that is on.
    """
    layers: Any = decoder.layers
    names = {id(module): name for name, module in base.named_modules()}
    for at, layer in enumerate(layers):
        layer.forward = _replayed(layer.forward, at, base, lora, f"{names[id(layer)]}.")
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own again


def _replayed(forward: Callable[..., Any], at: int, base: nn.Module, lora: Lora, under: str) -> Callable[..., Any]:
    """A layer's forward, checkpointed where gradients are wanted."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), lora.on(base, under=under)

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if kwargs.get("past_key_values") is not None:
            kwargs["past_key_values"] = _Replay(kwargs["past_key_values"], at)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **kwargs)

    return run


class _Replay:
    """One layer's place in a cache: the first update is real, later ones repeat it on a copy of what was there before.

    Args:
        cache: all layers' KV.
        at: which layer.
    """

    def __init__(self, cache: Cache, at: int) -> None:
        self._cache, self._real = cache, True
        self._before = copy.copy(cache.layers[at]) if at < len(cache.layers) else DynamicLayer()

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As ``Cache.update``."""
        if self._real:
            self._real = False
            first: tuple[Tensor, Tensor] = self._cache.update(keys, values, *args, **kwargs)
            return first
        again: tuple[Tensor, Tensor] = copy.copy(self._before).update(keys, values)
        return again

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)
