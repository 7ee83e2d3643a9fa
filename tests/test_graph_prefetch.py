"""Sequences on a GPU are a step ahead of whoever asks: the same tokens, whatever is asked for next."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sequences import moved, scored_after
from test_graph_runner import eager_model, greedy, pooled_model, read, same, some_ids

from s2t_agents import Engine
from s2t_agents.backends.base import Append, ScoreCandidates, Work
from s2t_agents.backends.statistics import statistics_at
from s2t_agents.backends.torch.cuda import decode_graphs, graph_runner
from s2t_agents.backends.torch.cuda.cuda_graph import Body, played
from s2t_agents.backends.torch.cuda.decode_graphs import DecodeGraph
from s2t_agents.backends.torch.cuda.graph_runner import SURE
from s2t_agents.backends.torch.cuda.in_flight import InFlightRow, InFlightStep
from s2t_agents.backends.torch.cuda.kv_pool import SMALLEST, PooledKVCache
from s2t_agents.proposal import Proposal
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.scheduling.requests import AppendRequest
from s2t_agents.scheduling.sequence import TokenSequence
from s2t_agents.types import Sampling


@pytest.fixture(scope="module")
def ours() -> LanguageModel:
    return pooled_model(record=played, often=0)


@pytest.fixture(scope="module")
def theirs() -> LanguageModel:
    return eager_model()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How each step came about: by "begin", or "after" another that was still under way."""
    said: list[str] = []
    for name in ("begin", "after"):
        real = getattr(DecodeGraph, name)

        def watched(self: DecodeGraph, *args: Any, name: str = name, real: Any = real) -> list[InFlightRow]:
            said.append(name)
            return real(self, *args)  # type: ignore[no-any-return]

        monkeypatch.setattr(DecodeGraph, name, watched)
    return said


def cache_of(prefix: TokenSequence) -> PooledKVCache:
    assert isinstance(prefix.cache, PooledKVCache)
    return prefix.cache


def follow(prefix: TokenSequence, count: int) -> list[int]:
    """Extend a prefix by the model's own choice, so many times."""
    said = []
    for _ in range(count):
        said.append(int(prefix.logits.argmax()))
        prefix.append(said[-1:])
    return said


def test_greedy_answers_are_the_eager_ones_and_all_steps_but_the_first_are_begun_before_they_are_asked_for(
    taken: list[str],
) -> None:
    assert greedy(pooled_model(record=played), 2, 20) == greedy(eager_model(), 2, 20)
    assert taken == ["begin"] + ["after"] * 19


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_whatever_is_done_to_a_sequence_it_says_what_the_eager_one_says(
    ours: LanguageModel, theirs: LanguageModel, data: st.DataObject
) -> None:
    one, other = read(ours, some_ids(9)), read(theirs, some_ids(9))
    for _ in range(data.draw(st.integers(1, 6))):
        match data.draw(st.sampled_from(["follow", "another", "stretch", "cut", "rest", "look"])):
            case "follow":
                for token in follow(other, data.draw(st.integers(1, SURE + 3))):
                    one.append([token])
            case "another":
                token = int(other.logits.topk(2).indices[1])
                one.append([token])
                other.append([token])
            case "stretch":
                ids = some_ids(3, data.draw(st.integers(0, 9)))
                one.append(ids)
                other.append(ids)
            case "cut":
                ids = [*other.ids[: -data.draw(st.integers(1, 4))], data.draw(st.integers(0, 250))]
                moved(one, ids)
                moved(other, ids)
            case "rest":
                cache_of(one).park()
            case "look":
                candidates = torch.tensor([5, 9, 200])
                assert torch.allclose(scored_after(one, candidates), scored_after(other, candidates), atol=1e-4)
        same(one, other)


def test_a_row_that_is_left_with_a_step_under_way_serves_its_next_guest(
    ours: LanguageModel, theirs: LanguageModel
) -> None:
    one = read(ours, some_ids(9))
    follow(one, SURE + 3)
    assert cache_of(one).in_flight is not None
    cache_of(one).park()
    assert cache_of(one).in_flight is None
    # Of the same length and about to be asked for the same token: what was begun for the first is not the second's.
    guest, same_as = read(ours, some_ids(len(one), 5)), read(theirs, some_ids(len(one), 5))
    for _ in range(4):
        guest.append(follow(same_as, 1))
        same(guest, same_as)


def test_nobody_runs_ahead_of_the_end_of_its_row(ours: LanguageModel, theirs: LanguageModel) -> None:
    start = SMALLEST - SURE - 8
    one, other = read(ours, some_ids(start)), read(theirs, some_ids(start))
    for _ in range(SURE + 12):
        one.append(follow(other, 1))
        same(one, other)
        slot, in_flight = cache_of(one).slot, cache_of(one).in_flight
        assert slot is not None
        assert in_flight is None or in_flight.position <= slot.pool.capacity - 2


def test_a_token_that_was_not_expected_ends_the_running_ahead_until_the_model_is_followed_again(
    ours: LanguageModel, taken: list[str]
) -> None:
    prefix = read(ours, some_ids(9))
    follow(prefix, SURE + 3)
    assert cache_of(prefix).in_flight is not None
    prefix.append([int(prefix.logits.topk(2).indices[1])])
    assert cache_of(prefix).in_flight is None
    assert taken[-1] == "begin"
    follow(prefix, SURE - 1)
    assert cache_of(prefix).in_flight is None
    follow(prefix, 1)
    assert cache_of(prefix).in_flight is not None


def together(model: LanguageModel, prefixes: list[TokenSequence], tokens: list[int]) -> None:
    """One step of several sequences in one forward, as generations at once take it."""
    parts = [
        Append(torch.tensor([token]), prefix.cache, len(prefix)) for token, prefix in zip(tokens, prefixes, strict=True)
    ]
    for prefix, token, said in zip(prefixes, tokens, model.backend.forward(parts), strict=True):
        prefix.logits, prefix.hidden = said  # type: ignore[misc]
        prefix.ids.append(token)


def test_several_that_follow_the_model_are_a_step_ahead_together(taken: list[str]) -> None:
    ours, theirs = pooled_model(record=played), eager_model()
    ones, others = ([read(model, some_ids(9 + n, n)) for n in range(3)] for model in (ours, theirs))
    for _ in range(SURE + 6):
        together(ours, ones, [follow(other, 1)[0] for other in others])
        for one, other in zip(ones, others, strict=True):
            same(one, other)
    assert taken == ["begin"] + ["after"] * (SURE + 6)


def test_whoever_joins_is_a_step_ahead_with_the_others_from_its_first_token_on(taken: list[str]) -> None:
    ours, theirs = pooled_model(record=played), eager_model()
    ones, others = ([read(model, some_ids(9 + n, n)) for n in range(3)] for model in (ours, theirs))
    for part in [(0, 1)] * 3 + [(0, 1, 2)] * 3:
        together(ours, [ones[n] for n in part], [follow(others[n], 1)[0] for n in part])
        for one, other in zip(ones, others, strict=True):
            same(one, other)
    assert taken == ["begin", "after", "after", "after", "begin", "after", "after", "after"]


@pytest.mark.parametrize(("strays", "goes_on"), [(1, True), (2, True), (3, False)])
def test_a_few_that_do_not_follow_the_model_do_not_keep_the_others_from_being_ahead(
    strays: int, goes_on: bool, taken: list[str]
) -> None:
    ours, theirs = pooled_model(record=played), eager_model()
    ones, others = ([read(model, some_ids(9 + n, n)) for n in range(4)] for model in (ours, theirs))
    together(ours, ones, [follow(other, 1)[0] for other in others])
    taken.clear()
    tokens = [int(other.logits.topk(2).indices[int(n < strays)]) for n, other in enumerate(others)]
    together(ours, ones, tokens)
    for token, one, other in zip(tokens, ones, others, strict=True):
        other.append([token])
        same(one, other)
    assert taken == ["begin", *(["after"] * goes_on)]


def test_one_that_moves_to_a_larger_arena_leaves_behind_what_was_begun() -> None:
    ours, theirs = pooled_model(record=played), eager_model()
    ones, others = ([read(model, some_ids(9 + n, n)) for n in range(2)] for model in (ours, theirs))
    for _ in range(SURE + 3):
        ones[0].append(follow(others[0], 1))
    assert cache_of(ones[0]).in_flight is not None
    for _ in range(3):
        together(ours, ones, [follow(other, 1)[0] for other in others])
        for one, other in zip(ones, others, strict=True):
            same(one, other)


def test_those_whose_steps_were_begun_apart_go_on_together() -> None:
    ours, theirs = pooled_model(record=played), eager_model()
    ones, others = ([read(model, some_ids(9 + n, n)) for n in range(2)] for model in (ours, theirs))
    for part in [(0, 1)] * (SURE + 3) + [(0,)] + [(0, 1)] * 4:
        together(ours, [ones[n] for n in part], [follow(others[n], 1)[0] for n in part])
        for one, other in zip(ones, others, strict=True):
            same(one, other)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_whoever_joins_leaves_or_goes_its_own_way_all_say_what_they_say_alone(
    ours: LanguageModel, theirs: LanguageModel, data: st.DataObject
) -> None:
    ones, others = ([read(model, some_ids(9 + n, n)) for n in range(4)] for model in (ours, theirs))
    for _ in range(data.draw(st.integers(1, 5))):
        part = data.draw(st.sets(st.integers(0, 3), min_size=1))
        for _ in range(data.draw(st.sampled_from([1, SURE + 2]))):
            astray = data.draw(st.sets(st.sampled_from(sorted(part)))) if data.draw(st.integers(0, 3)) == 0 else set()
            tokens = [int(others[n].logits.topk(2).indices[int(n in astray)]) for n in sorted(part)]
            together(ours, [ones[n] for n in sorted(part)], tokens)
            for n, token in zip(sorted(part), tokens, strict=True):
                others[n].append([token])
        for one, other in zip(ones, others, strict=True):
            same(one, other)


def test_sampled_answers_are_the_eager_ones() -> None:
    said = [
        [step.token_id for step in Engine(model).steps(some_ids(9), Sampling(max_tokens=24, temperature=0.7, seed=3))]
        for model in (pooled_model(record=played), eager_model())
    ]
    assert said[0] == said[1]


def test_a_step_brings_its_glance_along_and_a_cut_forgets_it(ours: LanguageModel) -> None:
    assert read(pooled_model(), some_ids(9)).statistics is None  # read the eager way
    prefix = read(ours, some_ids(9))
    prefix.append([4])
    expected = statistics_at(prefix.logits)
    assert prefix.statistics is not None
    assert prefix.statistics.best == expected.best
    assert prefix.statistics.entropy == pytest.approx(expected.entropy, abs=1e-5)
    assert prefix.statistics.margin == pytest.approx(expected.margin, abs=1e-5)
    assert Proposal(prefix, 8).best == expected.best
    cache_of(prefix).truncate(len(prefix) - 1)
    assert prefix.statistics is None
    del prefix.ids[-1]
    prefix.append([7, 8])
    assert prefix.statistics is not None
    assert prefix.statistics.best == int(prefix.logits.argmax())


def test_what_a_grammar_forbids_is_not_what_the_step_has_brought_along(ours: LanguageModel) -> None:
    prefix = read(ours, some_ids(9))
    prefix.append([4])
    best = int(prefix.logits.argmax())
    allowed = torch.ones(ours.vocab_size, dtype=torch.bool)
    allowed[best] = False
    for proposal in (Proposal(prefix, 8, allowed=allowed), Proposal(prefix, 8, banned=[best])):
        proposal.fetch()
        assert proposal.best == int(proposal.logits.argmax()) != best
        assert proposal.entropy != prefix.statistics.entropy  # type: ignore[union-attr]


class Clock:
    """The host's time, between forwards only: what it does is as nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(graph_runner, "monotonic", lambda: self.now)


def unbilled_s(model: LanguageModel, prefixes: list[TokenSequence]) -> list[float]:
    """Seconds billed for a step of them all, beyond those that somebody has waited: its forward's own."""
    before = [prefix.compute.seconds for prefix in prefixes]
    requests = [
        AppendRequest(torch.tensor([int(prefix.logits.argmax())]), prefix.cache, prefix.compute) for prefix in prefixes
    ]
    parts = [request.work(1) for request in requests]
    for request, part, said in zip(requests, parts, model.backend.forward(parts), strict=True):
        request.complete(part, said)
    assert [cache_of(prefix).unbilled_s() for prefix in prefixes] == [0.0] * len(prefixes)
    return [prefix.compute.seconds - seconds for prefix, seconds in zip(prefixes, before, strict=True)]


def a_step_ahead(model: LanguageModel, count: int) -> list[TokenSequence]:
    prefixes = [read(model, some_ids(9 + n, n)) for n in range(count)]
    for _ in range(SURE + 2):
        together(model, prefixes, [int(prefix.logits.argmax()) for prefix in prefixes])
    assert all(cache_of(prefix).in_flight is not None for prefix in prefixes)
    return prefixes


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("device_s", "elsewhere_s", "expected"), [(4.0, 10.0, 4.0), (20.0, 10.0, 10.0), (4.0, 0.0, 0.0)]
)
def test_device_time_that_nobody_waited_for_is_billed_to_those_whose_step_it_was(
    count: int, device_s: float, elsewhere_s: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, model = Clock(monkeypatch), pooled_model(record=played)
    monkeypatch.setattr(InFlightStep, "device_s", device_s)
    prefixes = a_step_ahead(model, count)
    clock.now += elsewhere_s
    assert unbilled_s(model, prefixes) == pytest.approx([expected / count] * count)
    assert unbilled_s(model, prefixes) == [0.0] * count


def test_what_a_selection_has_waited_for_is_not_billed_again_with_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, model = Clock(monkeypatch), pooled_model(record=played)
    monkeypatch.setattr(InFlightStep, "device_s", 100.0)
    (prefix,) = a_step_ahead(model, 1)
    clock.now += 1.0
    scoring = ScoreCandidates(torch.tensor([5, 9]), prefix.cache, len(prefix))
    model.backend.forward([scoring])  # ... waits for all the device has begun
    clock.now += 5.0
    assert unbilled_s(model, [prefix]) == [1.0]


@pytest.mark.parametrize("kind", [ScoreCandidates, Append])
def test_what_others_in_the_same_forward_have_waited_for_is_not_billed_again(
    kind: type[Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, model = Clock(monkeypatch), pooled_model(record=played)
    monkeypatch.setattr(InFlightStep, "device_s", 100.0)
    other, (prefix,) = read(model, some_ids(5)), a_step_ahead(model, 1)
    token = int(prefix.logits.argmax())
    step = Append(torch.tensor([token]), prefix.cache, len(prefix))
    said, _ = model.backend.forward([step, kind(torch.tensor([4, 5, 6]), other.cache, len(other))])
    prefix.logits, prefix.hidden = said  # type: ignore[misc]
    prefix.ids.append(token)
    assert cache_of(prefix).in_flight is not None
    clock.now += 5.0
    assert unbilled_s(model, [prefix]) == [0.0]


def test_steps_that_were_begun_apart_are_billed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, model = Clock(monkeypatch), pooled_model(record=played)
    monkeypatch.setattr(InFlightStep, "device_s", 4.0)
    prefixes = a_step_ahead(model, 2)
    for prefix in prefixes:
        together(model, [prefix], [int(prefix.logits.argmax())])
        cache_of(prefix).unbilled_s()
        clock.now += 10.0
    assert unbilled_s(model, prefixes) == [4.0, 4.0]


def test_the_time_of_a_capture_is_none_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    happened = []

    def record(body: Body) -> Body:
        happened.append("recorded")
        return body

    monkeypatch.setattr(decode_graphs, "mark", lambda like: happened.append("marked"))
    prefix = read(pooled_model(record=record), some_ids(9))
    prefix.append([4])
    assert happened == ["marked", "recorded", "marked", "marked"]  # the last is that of the step begun after it


def test_what_a_failed_forward_has_left_ahead_is_forgotten(ours: LanguageModel) -> None:
    prefix = read(ours, some_ids(9))
    follow(prefix, 2)
    cache = cache_of(prefix)
    assert cache.in_flight is not None
    cache.truncate(len(prefix) - 1)
    assert cache.in_flight is None
    assert cache.statistics() is None
    assert cache.get_seq_length() == len(prefix) - 1
