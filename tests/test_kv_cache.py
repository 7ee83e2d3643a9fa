"""KV buffers: they grow in place and are a sequence's own."""

from __future__ import annotations

import torch
from torch import Tensor

from s2t_agents.backends.torch.candidate_overlay import cloned_rows
from s2t_agents.backends.torch.kv_cache import GRAIN, GrowingLayer, KVCache


def tokens(first: int, n: int) -> Tensor:
    """``[1, 2, n, 4]``, each token's values its number."""
    return torch.arange(first, first + n, dtype=torch.float32)[None, None, :, None].expand(1, 2, n, 4).clone()


def test_what_was_written_stays_while_it_grows() -> None:
    layer = GrowingLayer()
    for first in range(0, 3 * GRAIN, 100):
        keys, values = layer.update(tokens(first, 100), -tokens(first, 100))
        assert torch.equal(keys, tokens(0, first + 100))
        assert torch.equal(values, -tokens(0, first + 100))


def test_a_clone_is_its_own() -> None:
    layer = GrowingLayer()
    layer.update(tokens(0, 10), tokens(0, 10))
    other = layer.clone(6)
    other.update(tokens(50, 4), tokens(50, 4))
    assert torch.equal(layer.keys, tokens(0, 10))
    assert torch.equal(other.keys, torch.cat([tokens(0, 6), tokens(50, 4)], 2))


def test_rows_of_a_clone_grow_in_place_and_leave_the_original_alone() -> None:
    layer = GrowingLayer()
    layer.update(tokens(0, 10), -tokens(0, 10))
    clone = cloned_rows(KVCache([layer]), 3)
    buffer = clone.layers[0].keys.data_ptr()
    for at in range(20):
        token = tokens(10 + at, 1).expand(3, -1, -1, -1)
        keys, values = clone.update(token, -token, 0)
    assert keys.data_ptr() == buffer  # nothing was copied
    assert torch.equal(keys, tokens(0, 30).expand(3, -1, -1, -1))
    assert torch.equal(values, -keys)
    assert torch.equal(layer.keys, tokens(0, 10))
