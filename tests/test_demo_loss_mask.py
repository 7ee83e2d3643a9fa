"""The loss mask: only the token at which a wrong result leaves the right one loses its weight."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.demo_pair import tokenizer as tokenizers
from benchmarks.demo_pair.corpus import Encoder
from benchmarks.demo_pair.loss_mask import first_wrong
from benchmarks.demo_pair.recipe import read_recipe
from s2t_agents.bundled import WEIGHTS
from s2t_agents.demo.arithmetic import Operation

RECIPES = Path(__file__).parents[1] / "benchmarks" / "demo_pair"


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.load(WEIGHTS / "slm")


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("134 + 616 = 750. 750 - 76 = 674.", []),
        ("134 + 616 = 740.", [13]),  # the 4 of 740
        ("127 - 42 = 185.", [11]),  # the first digit
        ("90 + 90 = 18.", [12]),  # ends too early: what comes instead of the 0
        ("9 + 1 = 100.", [10]),  # goes on too long: the second 0
        ("1 + 1 = 3. 2 * 2 = 5.", [8, 19]),
    ],
)
def test_a_wrong_result_begins_where_it_leaves_the_right_one(text, at):
    assert first_wrong(text) == at


@given(st.integers(0, 999), st.integers(0, 999), st.sampled_from("+*"))
def test_right_results_are_not_masked(left, right, sign):
    assert first_wrong(f"{left} {sign} {right} = {Operation(left, sign, right).result}.") == []


def test_all_weights_are_kept_but_those_at_which_a_wrong_result_begins(tokenizer):
    messages = [{"role": "user", "content": "Sums"}, {"role": "assistant", "content": "5 + 5 = 10. 15 + 17 = 22."}]
    ids, plain = Encoder(tokenizer)(messages, [], 0.5)
    again, weights = Encoder(tokenizer, mask_wrong_results=True)(messages, [], 0.5)
    assert again == ids
    [wrong] = [at for at, (one, other) in enumerate(zip(plain, weights, strict=True)) if one != other]
    assert (plain[wrong], weights[wrong]) == (1.0, 0.0)
    assert tokenizer.decode(ids[: wrong + 1]).endswith("15 + 17 = 2")
    assert tokenizer.decode(ids[wrong + 1 :]).startswith("2.")


def test_a_recipe_has_wrong_results_with_loss_or_without_and_never_both(tmp_path):
    assert read_recipe(RECIPES / "llm_last.toml").masked_noise == 0.3
    assert read_recipe(RECIPES / "slm_last.toml").masked_noise == 0.0
    both = tmp_path / "both.toml"
    text = (RECIPES / "llm_last.toml").read_text(encoding="utf-8").replace("noise = 0.0", "noise = 0.5")
    both.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"noise is 0.5 and masked_noise 0.3"):
        read_recipe(both)
