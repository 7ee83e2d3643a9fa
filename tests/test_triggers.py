"""Triggers decide on one step's proposal, and compose."""

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2t_agents import ChatS2T
from s2t_agents.errors import ConfigError
from s2t_agents.proposal import Proposal, entropy_of
from s2t_agents.scheduling.sequence import TokenSequence
from s2t_agents.testing import tiny_model
from s2t_agents.triggers import always, at_random, entropy, margin, never, probe


def proposal(logits: list[float], k: int = 8, **options: object) -> Proposal:
    prefix = TokenSequence(tiny_model())
    prefix.logits = torch.tensor(logits)
    prefix.hidden = torch.tensor([1.0, -2.0])
    return Proposal(prefix, k, **options)  # type: ignore[arg-type]


SURE, TORN, EVEN = proposal([9.0, 0, 0, 0]), proposal([5.0, 4.9, 0, 0]), proposal([1.0, 1, 1, 1])


def test_entropy_is_that_of_the_distribution_in_nats() -> None:
    assert EVEN.entropy == pytest.approx(math.log(4), abs=1e-5)
    assert entropy(above=1.3)(EVEN)
    assert not entropy(above=1.4)(EVEN)
    assert not entropy(above=0.1)(SURE)


def test_margin_is_the_gap_between_the_two_best_probabilities() -> None:
    best = torch.tensor([5.0, 4.9, 0, 0]).softmax(0)
    assert TORN.margin == pytest.approx(float(best[0] - best[1]), abs=1e-6)
    assert margin(below=0.1)(TORN)
    assert not margin(below=0.1)(SURE)


def test_illegal_tokens_count_for_nothing() -> None:
    legal = torch.tensor([False, True, False, True])
    masked = proposal([9.0, 1, 8, 1], allowed=legal)
    assert masked.candidates.tolist() == [1, 3]
    assert masked.entropy == pytest.approx(math.log(2), abs=1e-5)
    only = proposal([9.0, 1, 8, 1], allowed=legal, banned=[1])
    assert (only.candidates.tolist(), only.margin, only.best) == ([3], 1.0, 3)


def test_candidates_are_the_k_best_in_order() -> None:
    assert proposal([0.0, 3, 1, 2], k=3).candidates.tolist() == [1, 3, 2]
    assert len(proposal([0.0, 3, 1, 2], k=64).candidates) == 4


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=300), st.integers(1, 64), st.data())
def test_of_tokens_that_tie_on_top_greedys_own_is_the_first_candidate(
    logits: list[int], k: int, data: st.DataObject
) -> None:
    allowed = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(logits), max_size=len(logits))))
    look = proposal([float(each) for each in logits], k=k, allowed=allowed)
    found = look.candidates.tolist()
    assert len(found) == len(set(found)) == min(k, int(allowed.sum()))
    assert look.logits[found].tolist() == look.logits.topk(min(k, len(logits))).values[: len(found)].tolist()
    assert not found or found[0] == look.best


def test_probe_is_a_logistic_function_of_hidden_state_and_entropy() -> None:
    look = probe(torch.tensor([0.5, 1.0, 2.0]), 0.25, above=0.5)
    expected = 1 / (1 + math.exp(-(0.5 - 2.0 + 2.0 * EVEN.entropy + 0.25)))
    assert look.probability(EVEN) == pytest.approx(expected, abs=1e-5)
    assert look(EVEN) is (expected >= 0.5)


def test_triggers_compose_with_or_and_and() -> None:
    either, both = entropy(above=1.3) | margin(below=0.1), entropy(above=1.3) & margin(below=0.1)
    assert [either(p) for p in (SURE, TORN, EVEN)] == [False, True, True]
    assert [both(p) for p in (SURE, TORN, EVEN)] == [False, False, True]
    assert repr(either) == "(entropy(above=1.3) | margin(below=0.1))"
    assert (always() & never())(EVEN) is False


def test_triggers_that_pickle_pickle_in_any_composition() -> None:
    composed = (entropy(above=1.3) | margin(below=0.1)) & always() | never()
    again = pickle.loads(pickle.dumps(composed))
    assert repr(again) == repr(composed)
    assert [again(p) for p in (SURE, TORN, EVEN)] == [False, True, True]
    assert pickle.loads(pickle.dumps(ChatS2T(trigger=composed))).trigger(TORN)


def test_at_random_hits_its_rate_and_repeats_with_its_seed() -> None:
    draws = [at_random(0.1, seed=3)(EVEN) for _ in range(3)]
    assert len(set(draws)) == 1
    often = at_random(0.1, seed=3)
    assert 60 < sum(often(EVEN) for _ in range(1000)) < 140


def test_thresholds_must_be_finite() -> None:
    for bad in (math.nan, math.inf):
        with pytest.raises(ConfigError, match="finite"):
            entropy(above=bad)


def test_entropy_is_that_of_the_legal_tokens() -> None:
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(0)) * 4
    legal = logits.masked_fill(torch.arange(500) % 3 == 0, -torch.inf)
    for each in (logits, legal):
        expected = torch.distributions.Categorical(logits=each.double()[:, each[0] > -torch.inf]).entropy()
        assert torch.allclose(entropy_of(each.log_softmax(-1)).double(), expected, atol=1e-5)
    sure = torch.full((10,), -torch.inf).index_fill(0, torch.tensor([4]), 0.0)
    assert float(entropy_of(sure)) == 0.0
