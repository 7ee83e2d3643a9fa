"""Training: a stopped and resumed run ends where an unbroken one does, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.demo_pair import tokenizer as tokenizers
from benchmarks.demo_pair.corpus import SHARD, Corpus, cut
from benchmarks.demo_pair.pretrain import Run, export, train
from benchmarks.demo_pair.recipe import Recipe, Shape, Stage, read_recipe
from s2t_agents.bundled import WEIGHTS

RECIPES = Path(__file__).parents[1] / "benchmarks" / "demo_pair"


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.load(WEIGHTS / "slm")


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr("benchmarks.demo_pair.corpus.SHARD", 16)


def tiny(**changes):
    values = {
        "name": "tiny",
        "seed": 5,
        "noise": 0.6,
        "steps": 12,
        "tokens": 512,
        "lr": 3e-3,
        "matrix_lr": 1e-2,
        "weight_decay": 0.01,
        "warmup": 0.1,
        "decay": 0.3,
        "clip": 1.0,
        "save_every": 100,
        "threads": 1,
        "shape": Shape(hidden=32, layers=1, heads=2, kv_heads=1, head_dim=16, feed_forward=32),
        "stages": (Stage(0.5, {"copy": 1.0}, 0.1), Stage(1.0, {"word": 1.0, "tool": 1.0}, 0.0)),
    }
    return Recipe(**{**values, **changes})


def test_a_resumed_run_equals_an_unbroken_one(tokenizer, tmp_path):
    whole = Run(tiny(), tokenizer, tmp_path / "whole")
    train(whole, 12)
    first = Run(tiny(), tokenizer, tmp_path / "parts")
    train(first, 7)
    second = Run(tiny(), tokenizer, tmp_path / "parts")
    second.resume()
    assert second.step == 7
    train(second, 12)
    assert second.tokens == whole.tokens
    for left, right in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_few_steps_of_training_help(tokenizer, tmp_path):
    run = Run(tiny(steps=30, stages=(Stage(1.0, {"talk": 1.0}, 0.0),)), tokenizer, tmp_path)
    losses = [run.train_step() for _ in range(30)]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


def test_an_interrupted_save_leaves_the_old_checkpoint(tokenizer, tmp_path, monkeypatch):
    run = Run(tiny(), tokenizer, tmp_path)
    run.save()
    before = run.checkpoint.read_bytes()

    def full(*_args, **_options):
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        run.save()
    assert run.checkpoint.read_bytes() == before


def test_export_is_an_ordinary_checkpoint(tokenizer, tmp_path):
    run = Run(tiny(), tokenizer, tmp_path)
    export(run.model, tokenizer, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    assert again.dtype == torch.bfloat16
    assert again.config.tie_word_embeddings
    for left, right in zip(run.model.parameters(), again.parameters(), strict=True):
        assert torch.equal(left.to(torch.bfloat16), right)


def test_batches_keep_to_their_size(tokenizer):
    corpus = Corpus(tiny(tokens=1024), tokenizer)
    for step in range(8):
        batch = corpus.next(step)
        assert batch.ids.shape == batch.weights.shape
        assert batch.ids.numel() <= 1024
    rows = [([0] * n, [1.0] * n) for n in (1, 2, 3, 300)]
    assert cut(rows, 50) == [(0, 3), (3, 4)]
    assert SHARD == 1024


def test_rates_and_stages():
    recipe = tiny(steps=100, warmup=0.1, decay=0.5)
    assert [round(recipe.rate_at(step), 2) for step in (0, 9, 40, 75, 99)] == [0.1, 1.0, 1.0, 0.5, 0.05]
    assert recipe.stage_at(0) is recipe.stages[0]
    assert recipe.stage_at(99) is recipe.stages[1]


def test_the_shipped_recipes_are_valid(tmp_path):
    assert read_recipe(RECIPES / "slm.toml").noise == 0.6
    assert read_recipe(RECIPES / "llm.toml", steps=7).steps == 7
    bad = tmp_path / "bad.toml"
    bad.write_text((RECIPES / "slm.toml").read_text(encoding="utf-8").replace("noise =", "noize ="), encoding="utf-8")
    with pytest.raises(ValueError, match="noise, noize"):
        read_recipe(bad)


def test_a_run_may_go_on_from_a_bundled_model(tokenizer, tmp_path):
    recipe = read_recipe(RECIPES / "slm_more.toml")
    run = Run(recipe, tokenizer, tmp_path)
    known = AutoModelForCausalLM.from_pretrained(WEIGHTS / recipe.start, dtype=torch.float32)
    ours = run.model.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in known.state_dict().items())
    assert read_recipe(RECIPES / "slm.toml").start == ""
