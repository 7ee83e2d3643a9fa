"""KV buffers: they grow in place, are a sequence's own, and their memory goes back to the system with them."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from s2t_agents.backends.torch import kv_cache as kv
from s2t_agents.backends.torch.candidate_overlay import cloned_rows
from s2t_agents.backends.torch.kv_cache import GRAIN, GrowingLayer, KVCache, room


def tokens(first: int, n: int) -> Tensor:
    """``[1, 2, n, 4]``, each token's values its number."""
    return torch.arange(first, first + n, dtype=torch.float32)[None, None, :, None].expand(1, 2, n, 4).clone()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_buffer_has_the_tensors_shape_and_dtype_and_can_be_written(dtype: torch.dtype) -> None:
    buffer = room(torch.zeros(1, 2, 3, 4, dtype=dtype), 7)
    assert (buffer.shape, buffer.dtype, buffer.device.type) == ((1, 2, 7, 4), dtype, "cpu")
    assert buffer.is_contiguous()
    buffer.fill_(1.5)
    assert torch.equal(buffer, torch.full((1, 2, 7, 4), 1.5, dtype=dtype))
    assert room(buffer, 0).shape == (1, 2, 0, 4)


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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_the_memory_of_what_is_dropped_goes_back_though_small_things_among_it_stay() -> None:
    like = torch.zeros(1, 2, 1, 64)
    buffers, small, before = [], [], resident()
    for _ in range(500):  # 64 KiB each: too little for the C library to map on its own
        buffers.append(room(like, 128).fill_(1))
        small.append(torch.ones(100))
    grown = resident() - before
    assert grown > 28 * 2**20
    buffers.clear()
    assert resident() - before < grown / 4
    assert len(small) == 500


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_does_not_write_to_its_parents_kv() -> None:
    buffer = room(torch.zeros(1, 1, 1, 4), 4).fill_(1)
    child = os.fork()
    if child == 0:
        buffer.fill_(2)
        os._exit(0)
    os.waitpid(child, 0)
    assert torch.equal(buffer, torch.ones(1, 1, 4, 4))


def test_where_no_mapping_is_left_the_heap_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(kv.mmap, "mmap", full)
    assert torch.equal(room(torch.zeros(1, 1, 1, 2), 3).fill_(4), torch.full((1, 1, 3, 2), 4.0))
