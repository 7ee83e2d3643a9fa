"""Asked when needed, the large model does a fraction of the work for the very same picks."""

from typing import Any

import pytest

from s2t_agents.bench.escalate import run, table
from s2t_agents.errors import ConfigError


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return run(n=6, seed=3)


def test_the_picks_are_identical(result: dict[str, Any]) -> None:
    assert result["picks_identical"]
    for name in ("tokens", "escalations"):
        assert result["ours"][name] == result["published"][name] > 0


def test_the_llm_runs_once_per_question_instead_of_once_per_token(result: dict[str, Any]) -> None:
    assert result["ours"]["llm_calls"] == result["ours"]["escalations"]
    assert result["published"]["llm_calls"] == result["published"]["tokens"]
    assert result["published_over_ours"]["llm_calls"] >= 5
    assert result["published_over_ours"]["llm_s"] > 2
    assert result["ours"]["llm_tokens"] <= result["published"]["llm_tokens"]


def test_people_get_a_table(result: dict[str, Any]) -> None:
    assert table(result).row_count == 6
    assert table(result).caption == "the same picks"


@pytest.mark.parametrize("bad", [{"n": 0}, {"rate": 0}, {"rate": 1.5}])
def test_settings_that_can_not_work_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="at least 1 problem"):
        run(**bad)
