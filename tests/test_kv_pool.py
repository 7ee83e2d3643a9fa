"""Memory of arenas: bounded all together, given back at once, and for as many as it lasts."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sequences import scored_after
from test_graph_runner import CANDIDATES, eager_model, is_seated, pooled_model, read, same, some_ids, some_lora
from torch_models import runner

from s2t_agents.backends.base import Append
from s2t_agents.backends.torch.cuda import graph_runner
from s2t_agents.backends.torch.cuda.cuda_graph import Body, played
from s2t_agents.backends.torch.cuda.kv_pool import SMALLEST, KVPool, KVPools, PooledKVCache
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.scheduling.sequence import TokenSequence

ROW = 4 * 2 * 2 * 8 * 4 * SMALLEST
"""Bytes of a row of the smallest bucket of the tiny model."""


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def arena_of(prefix: TokenSequence) -> KVPool:
    assert isinstance(prefix.cache, PooledKVCache)
    assert prefix.cache.slot is not None
    return prefix.cache.slot.pool


def together(model: LanguageModel, prefixes: list[TokenSequence], token: int) -> None:
    """One token for each in one forward, as generations at once take it."""
    parts = [Append(torch.tensor([token]), prefix.cache, len(prefix)) for prefix in prefixes]
    for prefix, said in zip(prefixes, model.backend.forward(parts), strict=True):
        prefix.logits, prefix.hidden = said  # type: ignore[misc]
        prefix.ids.append(token)


class Bodies:
    """A recorder that knows which of the bodies that it was given are still there: a graph keeps its own."""

    def __init__(self) -> None:
        self._given: list[weakref.ref[Any]] = []

    def __call__(self, body: Body) -> Body:
        self._given.append(weakref.ref(body))
        return body

    def of(self, graph: str) -> list[weakref.ref[Any]]:
        """Those of a class of graphs."""
        return [each for each in self._given if (body := each()) and body.__qualname__.startswith(graph)]


def test_an_arena_that_all_have_left_is_gone_at_once_with_all_that_was_made_for_it(no_collection: None) -> None:
    bodies = Bodies()
    model = pooled_model(record=bodies)
    one, other = (read(model, some_ids(9 + n, n)) for n in range(2))
    one.append([4])
    scored_after(one, CANDIDATES)
    left = arena_of(one)
    gone = [weakref.ref(left), *bodies.of("DecodeGraph"), *bodies.of("CandidateGraph")]
    assert len(gone) == 3
    del left
    together(model, [one, other], 5)
    assert arena_of(one) is arena_of(other)
    assert [ref() for ref in gone] == [None] * 3


def test_without_memory_for_a_row_the_eager_step_is_taken() -> None:
    ours, theirs = pooled_model(pools=KVPools(limit_bytes=1000)), eager_model()
    one, other = read(ours, some_ids(9)), read(theirs, some_ids(9))
    for prefix in (one, other):
        prefix.append([4])
    assert not is_seated(one)
    same(one, other)


def test_an_empty_arena_makes_room_for_one_that_is_wanted() -> None:
    model = pooled_model(pools=KVPools(limit_bytes=2 * ROW))  # one row of the second bucket
    arenas = []
    for length in (5, SMALLEST + 5):
        prefix = read(model, some_ids(length))
        prefix.append([1])
        assert is_seated(prefix)
        arenas.append((weakref.ref(arena_of(prefix)), arena_of(prefix).capacity))
        del prefix
        gc.collect()
    assert [(capacity, there() is not None) for there, capacity in arenas] == [
        (SMALLEST, False),
        (2 * SMALLEST, True),
    ]


def test_selections_are_kept_for_the_adapters_there_are_as_they_are_now(no_collection: None) -> None:
    bodies = Bodies()
    model = pooled_model(record=bodies)
    prefix = read(model, some_ids(9))
    prefix.append([4])

    lora = some_lora(model)
    scored_after(prefix, CANDIDATES, lora)
    (first,) = bodies.of("CandidateGraph")
    with torch.no_grad():
        lora.layers[0].b.mul_(2)
    expected = scored_after(read(eager_model(), [*some_ids(9), 4]), CANDIDATES, lora)
    assert torch.allclose(scored_after(prefix, CANDIDATES, lora), expected, atol=1e-4)
    (second,) = bodies.of("CandidateGraph")
    assert first() is None
    scored_after(prefix, CANDIDATES)
    assert len(bodies.of("CandidateGraph")) == 2
    del lora
    (bare,) = bodies.of("CandidateGraph")
    assert second() is None
    assert bare() is not None


def test_a_replaced_arena_counts_while_somebody_who_pauses_sits_in_it() -> None:
    ours, theirs = pooled_model(record=played, pools=KVPools(limit_bytes=4 * ROW)), eager_model()
    ones, others = ([read(model, some_ids(9 + n, n)) for n in range(3)] for model in (ours, theirs))
    together(ours, ones[:2], 4)
    ones[2].append([4])  # room for it would take four rows, beside the two that the others do not leave now
    for one, other in zip(ones, others, strict=True):
        other.append([4])
        same(one, other)
    assert [is_seated(one) for one in ones] == [True, True, False]
    together(ours, ones, 5)  # now they all move, and nobody stays behind
    for one, other in zip(ones, others, strict=True):
        other.append([5])
        same(one, other)
    assert {arena_of(one).rows for one in ones} == {4}


def eagerly(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many parts go the eager way, in every forward where some do."""
    counts: list[int] = []
    graphs = runner(model).graph_runner
    assert graphs is not None
    real = graphs.pass_over

    def counted(parts: Any) -> None:
        counts.append(len(parts))
        real(parts)

    monkeypatch.setattr(graphs, "pass_over", counted)
    return counts


def all_the_same(ones: list[TokenSequence], others: list[TokenSequence], token: int) -> None:
    """After the others have taken the token, too."""
    for one, other in zip(ones, others, strict=True):
        other.append([token])
        same(one, other)


def test_a_long_sequence_beside_short_ones_takes_no_more_than_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pooled_model(record=played, pools=KVPools(limit_bytes=8 * ROW)), eager_model()
    ones, others = ([read(model, some_ids(n, n)) for n in (9, 10, 11, 3 * SMALLEST)] for model in (ours, theirs))
    eager = eagerly(ours, monkeypatch)
    for token in (4, 5):
        together(ours, ones, token)
        all_the_same(ones, others, token)
    assert [arena_of(one).capacity for one in ones] == [SMALLEST] * 3 + [4 * SMALLEST]
    assert eager == []


def test_whom_there_is_no_memory_for_goes_the_eager_way_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pooled_model(record=played, pools=KVPools(limit_bytes=2 * ROW)), eager_model()
    ones, others = ([read(model, some_ids(n, n)) for n in (9, 10, 11, 600)] for model in (ours, theirs))
    eager = eagerly(ours, monkeypatch)
    together(ours, ones, 4)
    all_the_same(ones, others, 4)
    assert [is_seated(one) for one in ones] == [True, True, False, False]
    del ones[0], others[0]
    gc.collect()
    together(ours, ones, 5)
    all_the_same(ones, others, 5)
    assert [is_seated(one) for one in ones] == [True, True, False]
    assert eager == [2, 1]


def test_what_one_arena_has_said_stands_when_the_next_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = []

    def first_only(body: Any) -> Any:
        recorded.append(body)
        if len(recorded) > 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        return body

    ours, theirs = pooled_model(record=first_only, pools=KVPools(limit_bytes=6 * ROW)), eager_model()
    ones, others = ([read(model, some_ids(n, n)) for n in (9, 10, 3 * SMALLEST)] for model in (ours, theirs))
    eager = eagerly(ours, monkeypatch)
    for token in (4, 5):
        together(ours, ones, token)
        all_the_same(ones, others, token)
    assert eager == [1, 3]


def test_when_memory_was_out_the_eager_way_is_taken_for_a_while_and_no_longer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now, tries = [1000.0], []

    def out_at_first(body: Any) -> Any:
        tries.append(now[0])
        if len(tries) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return body

    monkeypatch.setattr(graph_runner, "monotonic", lambda: now[0])
    ours, theirs = pooled_model(record=out_at_first), eager_model()
    one, other = read(ours, some_ids(9)), read(theirs, some_ids(9))
    with caplog.at_level(logging.WARNING):
        for seconds in (0, 1, graph_runner.RETRY_S):
            now[0] += seconds
            one.append([4])
            other.append([4])
            same(one, other)
    assert tries == [1000.0, 1001.0 + graph_runner.RETRY_S]
    assert runner(ours).graph_runner is not None
    assert not runner(ours).graph_runner.failed
    (record,) = caplog.records
    assert record.message == "for 60 s steps and selections go on without captured graphs: CUDA out of memory."
