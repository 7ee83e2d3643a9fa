"""Pacing on recorded receipts: between spending in order and hindsight, and the same figures for the same seed."""

from typing import Any

import pytest

from benchmarks import pacing
from s2t_agents.errors import ConfigError


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return pacing.run(12, seed=3, orders=5)


def test_every_budget_has_a_share_of_the_best_that_hindsight_could_do(result: dict[str, Any]) -> None:
    assert [row["budget"] for row in result["shares"]] == list(pacing.SHARES)
    assert result["selections"] > 5
    for row in result["shares"]:
        assert 0 <= row["uncertainty"]["first_come"] <= 1
        assert 0 <= row["uncertainty"]["paced"] <= 1
    assert pacing.table(result).row_count == len(pacing.SHARES)


def test_where_the_llm_changes_nothing_there_is_no_share_of_it() -> None:
    assert pacing.shares([0.1, 0.2], [0.0, 0.0], 0.5, orders=3, seed=0) == {"first_come": None, "paced": None}


def test_a_budget_for_all_of_them_gains_all() -> None:
    assert pacing.shares([0.1, 0.2, 0.9], [1.0, 0.0, 1.0], 1.0, orders=3, seed=0) == {"first_come": 1.0, "paced": 1.0}


@pytest.mark.parametrize("bad", [{"n": 0}, {"orders": 0}])
def test_settings_that_cannot_work_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        pacing.run(**bad)
