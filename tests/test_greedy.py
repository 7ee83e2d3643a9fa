"""The likeliest tokens of logits, one after another."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from s2t_agents.greedy import argmax, descending


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("size", [1, 2, 7, 300])
def test_tokens_come_in_order_and_ties_by_their_ids(size: int, seed: int) -> None:
    logits = torch.randint(0, 20, (size,), generator=torch.Generator().manual_seed(seed)).float()
    order = sorted(range(size), key=lambda token: (-float(logits[token]), token))
    assert list(descending(logits, size + 1)) == order
    assert list(descending(logits, 3)) == order[:3]
    assert next(descending(logits, 1)) == argmax(logits)


def test_what_is_at_minus_infinity_never_comes() -> None:
    logits = torch.full((9,), -torch.inf)
    assert list(descending(logits, 9)) == []
    logits[4], logits[2] = 1.0, -3.0
    assert list(descending(logits, 9)) == [4, 2]


def test_only_what_is_asked_for_is_looked_at() -> None:
    logits = torch.arange(5.0)
    assert list(islice(descending(logits, 5), 2)) == [4, 3]
    assert list(descending(logits, 0)) == []
