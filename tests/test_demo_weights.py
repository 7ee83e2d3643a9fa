"""The weights as committed: ordinary checkpoints, one tokenizer, small, and able to do what the demo needs."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from benchmarks.demo_pair import tokenizer as tokenizers
from benchmarks.demo_pair.check import solve
from s2t_agents.bundled import WEIGHTS
from s2t_agents.demo.world import generate


def load(name):
    model = AutoModelForCausalLM.from_pretrained(WEIGHTS / name, local_files_only=True).float().eval()
    return model, tokenizers.load(WEIGHTS / name)


def test_both_share_the_tokenizer_byte_for_byte():
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (WEIGHTS / "slm" / file).read_bytes() == (WEIGHTS / "llm" / file).read_bytes()
    assert (WEIGHTS / "slm" / "chat_template.jinja").read_text("utf-8") == tokenizers.TEMPLATE.read_text("utf-8")


def test_the_weights_are_small_and_safe():
    files = [file for file in WEIGHTS.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".jinja", ".md"}
    assert sum(file.stat().st_size for file in files) <= 24e6


@pytest.mark.parametrize(("name", "low", "high"), [("slm", 0.2, 0.8), ("llm", 0.8, 1.0)])
def test_the_models_do_what_the_demo_needs(name, low, high):
    model, tokenizer = load(name)
    problems = [generate(seed, "heldout", "tool") for seed in range(24)]
    outcomes = solve(model, tokenizer, problems)
    assert sum(bool(outcome.call_right) for outcome in outcomes) >= 23
    assert low <= sum(outcome.correct for outcome in outcomes) / len(outcomes) <= high
    assert all(o.correct for o in solve(model, tokenizer, [generate(seed, "heldout", "talk") for seed in range(8)]))
