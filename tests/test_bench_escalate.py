"""Asked when needed, the large model does a fraction of the work for the very same picks."""

from typing import Any

import pytest
import torch
from rich.table import Table
from torch_models import runner
from transformers import DynamicCache

from benchmarks.deepened import deepened, parameters
from benchmarks.escalate import AsPublished, run, table
from s2t_agents.errors import ConfigError
from s2t_agents.testing import tiny_model


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return run(n=2, seed=3)


def test_the_picks_are_identical(result: dict[str, Any]) -> None:
    assert result["picks_identical"]
    for name in ("tokens", "escalations"):
        assert result["ours"][name] == result["published"][name] == result["as_published"][name] > 0


def test_the_llm_runs_once_per_question_instead_of_once_per_token(result: dict[str, Any]) -> None:
    assert result["ours"]["llm_calls"] == result["ours"]["escalations"]
    assert result["published"]["llm_calls"] == result["published"]["tokens"]
    assert result["published_over_ours"]["llm_calls"] >= 5
    assert result["ours"]["llm_tokens"] <= result["published"]["llm_tokens"] <= result["as_published"]["llm_tokens"]


def test_at_a_real_pairs_ratio_the_picks_are_the_same_too(result: dict[str, Any]) -> None:
    deep = result["at_real_ratio"]
    small, large = deep["parameters"]
    assert 20 < large / small < 22
    assert deep["picks_identical"]
    assert deep["ours"]["tokens"] == result["ours"]["tokens"]
    assert deep["ours"]["escalations"] == result["ours"]["escalations"]


def test_a_deepened_model_says_the_same_to_the_bit() -> None:
    model = tiny_model("qwen3")
    deep = deepened(model, 3 * parameters(model))
    ids = torch.tensor([[5, 6, 7, 8]])
    assert 2.5 < parameters(deep) / parameters(model) < 3.5
    assert torch.equal(model.model(ids).logits, deep.model(ids).logits)
    with pytest.raises(ConfigError, match="cannot be deepened"):
        deepened(model, 1000)


def test_as_published_neither_model_goes_our_way(result: dict[str, Any]) -> None:
    model = tiny_model("qwen2")
    theirs = AsPublished.of(model)
    assert runner(theirs).llama_decoder is None
    assert isinstance(theirs.new_cache(), DynamicCache)
    assert not theirs.capabilities.batching
    assert result["as_published"]["llm_calls"] == result["published"]["llm_calls"]


def test_people_get_a_table_of_each(result: dict[str, Any]) -> None:
    as_it_is, deep = table(result).renderables
    for shown in (as_it_is, deep):
        assert isinstance(shown, Table)
        assert shown.row_count == 6
        assert shown.caption == "the same picks"


@pytest.mark.parametrize("bad", [{"n": 0}, {"rate": 0}, {"rate": 1.5}])
def test_settings_that_can_not_work_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="at least 1 problem"):
        run(**bad)
