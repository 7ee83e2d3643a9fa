"""Memory for KV: buffers are independent, what is dropped serves the next of its size, and the rest goes back."""

from __future__ import annotations

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from forked import run
from torch import Tensor

from s2t_agents.backends.torch import kv_memory
from s2t_agents.backends.torch.kv_memory import SIZES, room


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
    second = room(like, 333)
    assert second.data_ptr() != where  # the view is still read
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


def test_only_a_few_sizes_are_kept_and_those_asked_for_last(monkeypatch: pytest.MonkeyPatch) -> None:
    like, made, mapped = torch.zeros(1, 1, 1, 64), [], kv_memory.mmap.mmap
    monkeypatch.setattr(kv_memory.mmap, "mmap", lambda *words, **named: made.append(words) or mapped(*words, **named))

    def mappings(capacity: int) -> int:
        """How many are made for a buffer that is dropped at once."""
        made.clear()
        room(like, capacity)
        return len(made)

    assert [mappings(1000), mappings(1000)] == [1, 0]
    assert [mappings(2000 + at) for at in range(SIZES)] == [1] * SIZES
    assert [mappings(2000 + at) for at in range(SIZES)] == [0] * SIZES
    assert mappings(1000) == 1


INTERRUPTED = """
import signal, sys, torch
from s2t_agents.backends.torch.kv_memory import room

class Raised(Exception): pass
def handler(*_): raise Raised
sys.unraisablehook = lambda _: None  # torch's own weak references have a finalizer
signal.signal(signal.SIGALRM, handler)
like, caught = torch.zeros(1, 2, 1, 8), 0
for turn in range(300):
    held = []
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0002 + turn * 1e-6)
        for _ in range(10**6):
            held.append(room(like, 64 + 64 * (len(held) % 3)).fill_(len(held)))
            if len(held) > 6:
                assert [int(each[0, 0, 0, 0]) for each in held] == [*range(7)]
                held.clear()
    except Raised:
        caught += 1
held.clear()
first = room(like, 64).data_ptr()
assert room(like, 64).data_ptr() == first
print(caught)
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers")
def test_signal_handlers_may_raise_anywhere_and_buffers_are_still_used_again() -> None:
    done = run("-c", INTERRUPTED)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) > 200


RETURNED = """
import mmap, torch
from pathlib import Path
from s2t_agents.backends.torch.kv_memory import room

def resident(): return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

like = torch.zeros(1, 2, 1, 64)
buffers, small, before = [], [], resident()
for _ in range(4000):  # 64 KiB each: too little for the C library to map on its own
    buffers.append(room(like, 128).fill_(1))
    small.append(torch.ones(100))
grown = resident() - before
buffers.clear()
print(grown, resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_the_memory_of_what_is_dropped_goes_back_though_small_things_among_it_stay() -> None:
    grown, left = map(int, run("-c", RETURNED).stdout.split())
    assert grown > 230 * 2**20
    assert left < grown / 6  # the recent ones of this size, and the small things


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
