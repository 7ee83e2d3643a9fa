"""Memory for KV: buffers are independent, what is dropped serves the next of its size, and the rest goes back."""

from __future__ import annotations

import gc
import mmap
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s2t_agents.backends.torch import kv_memory
from s2t_agents.backends.torch.kv_memory import LIMIT_BYTES, FreeMappings, room

PAGE = mmap.PAGESIZE


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_buffer_has_the_tensors_shape_and_dtype_and_can_be_written(dtype: torch.dtype) -> None:
    for _ in range(2):  # the second lies where the first was
        buffer = room(torch.zeros(1, 2, 3, 4, dtype=dtype), 7)
        assert (buffer.shape, buffer.dtype, buffer.device.type) == ((1, 2, 7, 4), dtype, "cpu")
        assert buffer.is_contiguous()
        buffer.fill_(1.5)
        assert torch.equal(buffer, torch.full((1, 2, 7, 4), 1.5, dtype=dtype))
    assert room(buffer, 0).shape == (1, 2, 0, 4)


def test_a_dropped_buffer_serves_the_next_of_its_size_once_no_view_of_it_is_left() -> None:
    like = torch.zeros(1, 3, 1, 40)
    first = room(like, 333)
    view, where = first[..., :5, :], first.data_ptr()
    del first
    assert room(like, 333).data_ptr() != where  # the view is still read
    view.fill_(3)
    del view
    assert room(like, 333).data_ptr() == where


def test_buffers_in_use_never_share_memory_whoever_drops_and_takes_them() -> None:
    like = torch.zeros(1, 2, 1, 8)

    def fill(worker: int) -> bool:
        held: list[Tensor] = []
        for turn in range(300):
            buffer = room(like, 64 + 64 * (turn % 3)).fill_(1000 * worker + turn)
            held.append(buffer)
            if len(held) > 5:
                oldest = held.pop(turn % 5)
                assert bool((oldest == oldest.flatten()[0]).all())
                assert int(oldest.flatten()[0]) // 1000 == worker
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(fill, range(8)))


@settings(max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 6)), max_size=40))
def test_what_is_free_stays_within_the_limit_and_the_size_not_asked_for_goes_first(
    turns: list[tuple[bool, int]],
) -> None:
    free, limit = FreeMappings(limit_bytes=8 * PAGE), 8
    expected: list[mmap.mmap] = []  # least recently used first
    for takes, pages in turns:
        if takes:
            mapping = free.take(pages * PAGE)
            assert len(mapping) == pages * PAGE
            of_size = [each for each in expected if len(each) == pages * PAGE]
            assert mapping in of_size or not of_size
            rest = [each for each in of_size if each is not mapping]
            expected = [each for each in expected if len(each) != pages * PAGE] + rest
        else:
            free.put(mapping := mmap.mmap(-1, pages * PAGE))
            same, others = ([e for e in expected if (len(e) == len(mapping)) is is_same] for is_same in (True, False))
            expected = [*others, *same, mapping]
            while sum(len(each) for each in expected) > limit * PAGE:
                del expected[0]
    kept = {id(each) for each in expected}
    for pages in range(1, 7):
        found = [free.take(pages * PAGE) for _ in range(9)]
        assert {id(each) for each in found} & kept == {id(each) for each in expected if len(each) == pages * PAGE}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_the_memory_of_what_is_dropped_goes_back_though_small_things_among_it_stay() -> None:
    like = torch.zeros(1, 2, 1, 64)
    buffers, small, before = [], [], resident()
    for _ in range(4000):  # 64 KiB each: too little for the C library to map on its own
        buffers.append(room(like, 128).fill_(1))
        small.append(torch.ones(100))
    grown = resident() - before
    assert grown > 3 * LIMIT_BYTES
    buffers.clear()
    gc.collect()
    assert resident() - before < 1.25 * LIMIT_BYTES
    assert len(small) == 4000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_does_not_write_to_its_parents_kv() -> None:
    like = torch.zeros(1, 1, 1, 4)
    buffer = room(like, 4).fill_(1)
    child = os.fork()
    if child == 0:
        buffer.fill_(2)
        del buffer
        again = room(like, 4).fill_(3)
        os._exit(int(again[0, 0, 0, 0]) != 3)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(buffer, torch.ones(1, 1, 4, 4))


def test_where_no_mapping_is_left_the_heap_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(kv_memory.mmap, "mmap", full)
    assert torch.equal(room(torch.zeros(1, 1, 1, 3), 5).fill_(4), torch.full((1, 1, 5, 3), 4.0))
