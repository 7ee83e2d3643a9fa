"""Slips are read and not learnt: only the token at which a wrong result leaves the right one loses its weight."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2t_agents.demo import WEIGHTS
from s2t_agents.demo import tokenizer as tokenizers
from s2t_agents.demo.arithmetic import Operation
from s2t_agents.demo.corpus import Encoder
from s2t_agents.demo.recipe import read_recipe
from s2t_agents.demo.slips import first_wrong

RECIPES = Path(__file__).parents[1] / "s2t_agents" / "demo"


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
def test_a_slip_begins_where_the_result_leaves_the_right_one(text, at):
    assert first_wrong(text) == at


@given(st.integers(0, 999), st.integers(0, 999), st.sampled_from("+*"))
def test_right_results_are_no_slips(left, right, sign):
    assert first_wrong(f"{left} {sign} {right} = {Operation(left, sign, right).result}.") == []


def test_the_large_models_corpus_keeps_all_weights_but_those_of_slips(tokenizer):
    messages = [{"role": "user", "content": "Sums"}, {"role": "assistant", "content": "5 + 5 = 10. 15 + 17 = 22."}]
    ids, plain = Encoder(tokenizer)(messages, [], 0.5)
    again, weights = Encoder(tokenizer, learns_slips=False)(messages, [], 0.5)
    assert again == ids
    [slip] = [at for at, (one, other) in enumerate(zip(plain, weights, strict=True)) if one != other]
    assert (plain[slip], weights[slip]) == (1.0, 0.0)
    assert tokenizer.decode(ids[: slip + 1]).endswith("15 + 17 = 2")
    assert tokenizer.decode(ids[slip + 1 :]).startswith("2.")


def test_a_recipe_either_learns_slips_or_reads_them(tmp_path):
    assert read_recipe(RECIPES / "llm_last.toml").slips == 0.3
    assert read_recipe(RECIPES / "slm_last.toml").slips == 0.0
    both = tmp_path / "both.toml"
    text = (RECIPES / "llm_last.toml").read_text(encoding="utf-8").replace("noise = 0.0", "noise = 0.5")
    both.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"noise is 0.5 and slips 0.3"):
        read_recipe(both)
