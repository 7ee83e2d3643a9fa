"""Prompts and turns read by captured graphs, played from a tape: what the eager way says, or left to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_graph_runner import FAMILIES, eager_model, is_seated, pooled_model, read, same, some_ids
from torch_models import runner

from s2t_agents.backends.base import Append
from s2t_agents.backends.torch.cuda import attention as static_attention
from s2t_agents.backends.torch.cuda import prefill_graphs
from s2t_agents.backends.torch.cuda.cuda_graph import played
from s2t_agents.backends.torch.cuda.kv_pool import SMALLEST, PooledKVCache


@pytest.mark.parametrize(("name", "more"), FAMILIES)
def test_a_played_stretch_says_what_the_eager_one_says(name: str, more: dict[str, Any]) -> None:
    ours, theirs = pooled_model(name, often=0, **more), eager_model(name, **more)
    one, other = read(ours, some_ids(30)), read(theirs, some_ids(30))
    for n in (2, 5, 16, 17, 40, 256, 1025, 3):
        for ids in (some_ids(n, n), [7]):  # the token after it sees that nothing else was left behind
            one.append(ids)
            other.append(ids)
            same(one, other)
    assert is_seated(one)
    assert runner(ours).graph_runner is not None
    assert not runner(ours).graph_runner.failed
    assert sorted(set(runner(ours).graph_runner.prefill_graphs.sizes)) == [16, 32, 64, 256, 1024]


@pytest.mark.parametrize("length", [1, 2, 16, 100])
def test_a_prompt_is_read_by_a_graph_too_where_its_length_comes_often(length: int) -> None:
    ours, theirs = pooled_model(often=0), eager_model()
    for seed in range(3):
        one, other = read(ours, some_ids(length, seed)), read(theirs, some_ids(length, seed))
        assert is_seated(one)
        for ids in ([5], some_ids(4, 1), [6]):
            one.append(ids)
            other.append(ids)
            same(one, other)


def test_a_stretch_of_one_sequence_leaves_its_neighbours_alone() -> None:
    ours, theirs = pooled_model(often=0), eager_model()
    ones, others = ([read(model, some_ids(9 + n, n)) for n in range(2)] for model in (ours, theirs))
    for chunks in ([[3]], [[4], [5]], [some_ids(20, 1), [6]], [some_ids(20, 2), some_ids(33, 3)], [[8], [9]]):
        parts = [Append(torch.tensor(ids), one.cache, len(one)) for ids, one in zip(chunks, ones, strict=False)]
        for ids, one, other, said in zip(chunks, ones, others, ours.backend.forward(parts), strict=False):
            one.logits, one.hidden = said  # type: ignore[misc]
            one.ids += ids
            other.append(ids)
        for one, other in zip(ones, others, strict=True):
            same(one, other)


def test_a_chunk_that_would_not_fit_into_its_row_moves_to_a_longer_one() -> None:
    ours, theirs = pooled_model(often=0), eager_model()
    ids = some_ids(SMALLEST - 12)
    one, other = read(ours, ids), read(theirs, ids)
    for more in ([5], some_ids(5, 1), [6]):
        one.append(more)
        other.append(more)
        same(one, other)
    assert isinstance(one.cache, PooledKVCache)
    assert one.cache.pool is not None
    assert one.cache.pool.capacity == 2 * SMALLEST


def test_chunks_are_captured_once_their_length_comes_often() -> None:
    model = pooled_model(often=2)
    prefix = read(model, some_ids(9))
    assert runner(model).graph_runner is not None
    captured = []
    for seed in range(4):
        prefix.append(some_ids(20, seed))
        captured.append(runner(model).graph_runner.captured["prefill"])
    assert captured == [0, 0, 1, 1]


def test_a_chunk_that_says_something_else_is_found_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = pooled_model(often=0), eager_model()
    real = static_attention.PrefillAttention.__call__
    monkeypatch.setattr(static_attention.PrefillAttention, "__call__", lambda self, *given: real(self, *given).flip(0))
    one, other = read(ours, some_ids(9)), read(theirs, some_ids(9))
    for ids in (some_ids(6, 1), [4], some_ids(6, 2)):
        one.append(ids)
        other.append(ids)
        same(one, other)
    assert "prompts go on without captured graphs: their logits are not those of the eager way" in caplog.text
    assert runner(ours).graph_runner is not None
    assert not runner(ours).graph_runner.failed
    assert runner(ours).graph_runner.captured == {"decode": 1, "prefill": 0, "candidates": 0}


def test_a_chunk_that_cannot_be_captured_leaves_steps_alone(caplog: pytest.LogCaptureFixture) -> None:
    def but_no_prefill(body: Any) -> Any:
        if "prefill_metadata" in body.__code__.co_names:
            raise RuntimeError("operation not permitted when stream is capturing")
        return body

    ours, theirs = pooled_model(record=but_no_prefill, often=0), eager_model()
    ones, others = ([read(model, some_ids(9 + n, n)) for n in range(2)] for model in (ours, theirs))
    for chunks in ([[3], [4]], [[4], some_ids(20, 2)], [[8], [9]], [[7], some_ids(20, 3)]):
        parts = [Append(torch.tensor(ids), one.cache, len(one)) for ids, one in zip(chunks, ones, strict=True)]
        for ids, one, other, said in zip(chunks, ones, others, ours.backend.forward(parts), strict=True):
            one.logits, one.hidden = said  # type: ignore[misc]
            one.ids += ids
            other.append(ids)
            same(one, other)
    assert caplog.text.count("prompts go on without captured graphs") == 1
    assert runner(ours).graph_runner is not None
    assert not runner(ours).graph_runner.failed


def test_a_stretch_without_memory_goes_the_eager_way_and_steps_go_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = pooled_model(record=played, often=0), eager_model()
    one, other = read(ours, some_ids(1)), read(theirs, some_ids(1))
    assert runner(ours).graph_runner is not None
    real = runner(ours).graph_runner.prefill_graphs.eager.__call__

    def out_of_memory(parts: Any) -> Any:
        monkeypatch.setattr(runner(ours).graph_runner.prefill_graphs, "eager", real)  # type: ignore[union-attr]
        layer = parts[0].cache.layers[0]  # as far as the forward has come
        layer.update(*(torch.ones(1, layer.keys.shape[1], 5, layer.keys.shape[-1]) for _ in range(2)))
        raise RuntimeError("CUDA error: out of memory")  # as drivers say it

    monkeypatch.setattr(runner(ours).graph_runner.prefill_graphs, "eager", out_of_memory)
    for ids in (some_ids(5, 1), [4], some_ids(5, 2), [7]):
        one.append(ids)
        other.append(ids)
        same(one, other)
    assert "for 60 s prompts go on without captured graphs" in caplog.text
    assert runner(ours).graph_runner.captured == {"decode": 1, "prefill": 1, "candidates": 0}
    assert not runner(ours).graph_runner.failed


def test_a_stretch_of_which_a_graph_would_keep_too_much_goes_the_eager_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_graphs, "LIMIT_BYTES", 1000)
    ours = pooled_model(often=0)
    same(read(ours, some_ids(20)), read(eager_model(), some_ids(20)))
    assert runner(ours).graph_runner is not None
    assert runner(ours).graph_runner.captured["prefill"] == 0
