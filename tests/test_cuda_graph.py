"""Captures disturb nobody and are disturbed by nobody. Without a GPU: what torch.cuda is asked for is watched."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from s2t_agents.backends.torch.cuda.cuda_graph import CudaGraphs, Replay
from s2t_agents.backends.torch.cuda.in_flight import mark

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
ONE = torch.ones(1)


class FakeStream:
    def __init__(self, device: torch.device | None = None) -> None:
        self.device, self.waits = device, 0

    def wait_stream(self, other: FakeStream) -> None:
        pass

    def synchronize(self) -> None:
        self.waits += 1


class FakeCuda:
    """As much of torch.cuda as captures need. As torch's, a capture that fails leaves its stream current."""

    def __init__(self) -> None:
        self.default = {FIRST: FakeStream(FIRST), SECOND: FakeStream(SECOND)}
        self.current, self.now = FIRST, self.default[FIRST]
        self.captured_on: list[FakeStream] = []
        self.synchronised = 0

    def graph_pool_handle(self) -> FakePool:
        return FakePool()

    def current_stream(self, device: torch.device | None = None) -> FakeStream:
        return self.now if device in (None, self.current) else self.default[device]

    def synchronize(self, device: Any = None) -> None:
        self.synchronised += 1

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        yield

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    @contextmanager
    def graph(self, graph: Any, *, pool: Any, stream: FakeStream, capture_error_mode: str) -> Iterator[None]:
        before, self.now = self.now, stream
        self.captured_on.append(stream)
        if pool.gone:  # as torch 2.11: "use_count > 0 INTERNAL ASSERT FAILED"
            raise RuntimeError("the pool is gone")
        pool.graphs += 1
        weakref.finalize(graph, pool.left)
        yield
        self.now = before


class FakePool:
    """Is gone for good once all graphs that were captured in it are."""

    def __init__(self) -> None:
        self.graphs, self.gone = 0, False

    def left(self) -> None:
        self.graphs -= 1
        self.gone = self.graphs == 0


class FakeGraph:
    def replay(self) -> None:
        pass


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    for name in ("graph_pool_handle", "current_stream", "synchronize", "device", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    return fake


def test_in_a_process_only_one_body_at_a_time_is_warmed_up_or_captured(cuda: FakeCuda) -> None:
    busy = threading.Lock()

    def body() -> tuple[torch.Tensor, ...]:
        assert busy.acquire(blocking=False)
        time.sleep(0.01)
        busy.release()
        return (ONE,)

    models = [CudaGraphs(FIRST), CudaGraphs(FIRST), CudaGraphs(SECOND)]
    with ThreadPoolExecutor(3) as pool:
        assert [replay() for replay in pool.map(lambda graphs: graphs(body), models)] == [(ONE,)] * 3


def test_a_model_can_capture_after_all_that_it_has_captured_is_gone(cuda: FakeCuda) -> None:
    graphs = CudaGraphs(FIRST)
    for _ in range(3):
        replay = graphs(lambda: (ONE,))
        assert replay() == (ONE,)
        del replay
        gc.collect()


def test_every_model_captures_on_one_stream_of_its_own_and_of_its_device(cuda: FakeCuda) -> None:
    one, other = CudaGraphs(FIRST), CudaGraphs(SECOND)
    for graphs in (one, other, one):
        graphs(lambda: (ONE,))
    first, second, third = cuda.captured_on
    assert first is third is not second
    assert (first.device, second.device) == (FIRST, SECOND)


@pytest.mark.parametrize("collects", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_no_garbage_is_collected_during_a_capture_and_afterwards_all_is_as_before(
    cuda: FakeCuda, collects: bool, fails: bool
) -> None:
    seen = []

    def body() -> tuple[torch.Tensor, ...]:
        seen.append(gc.isenabled())
        if fails and cuda.captured_on:
            raise RuntimeError("operation not permitted when stream is capturing")
        return (ONE,)

    was, stream = gc.isenabled(), cuda.now
    (gc.enable if collects else gc.disable)()
    try:
        if fails:
            with pytest.raises(RuntimeError, match="not permitted"):
                CudaGraphs(FIRST)(body)
        else:
            CudaGraphs(FIRST)(body)
        assert gc.isenabled() == collects
    finally:
        (gc.enable if was else gc.disable)()
    assert seen == [collects, False]
    assert cuda.now is stream


def test_a_replay_that_goes_waits_for_where_it_was_played_and_for_no_other_work(cuda: FakeCuda) -> None:
    replay = Replay(FakeGraph(), (ONE,), SECOND)  # type: ignore[arg-type]
    replay()
    del replay
    assert (cuda.default[SECOND].waits, cuda.default[FIRST].waits, cuda.synchronised) == (1, 0, 0)


def test_a_point_is_marked_in_the_work_of_the_tensors_own_device(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FakeEvent:
        def __init__(self, enable_timing: bool) -> None:
            self.recorded: Any = None

        def record(self, stream: FakeStream | None = None) -> None:
            self.recorded = stream or cuda.now

    class Elsewhere:
        is_cuda, device = True, SECOND

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    assert mark(Elsewhere()).recorded is cuda.default[SECOND]  # type: ignore[arg-type,union-attr]
