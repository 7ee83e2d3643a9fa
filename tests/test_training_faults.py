"""Faults of disk, files and models in training: each is named, and what was made before is kept."""

import json
import os
import signal
import time
from pathlib import Path
from subprocess import CompletedProcess

import forked
import pytest
import torch
from test_training_pipeline import TOML, made
from training_fixtures import QUICK, prompts, save_model, tiny_pair, write_prompts

from s2t_agents.atomic_write import write_whole
from s2t_agents.errors import AdapterMismatch, ConfigError, InputError, S2TError
from s2t_agents.selectors import SelectorConfig
from s2t_agents.selectors.config import BaseIdentity
from s2t_agents.selectors.learned_trigger import save_probe
from s2t_agents.testing import tiny_model
from s2t_agents.training.calibrate import calibrate_with
from s2t_agents.training.collect import collect, collect_with
from s2t_agents.training.config import (
    CalibrateConfig,
    EvaluateConfig,
    EvaluationRows,
    Fit,
    Models,
    ProbeConfig,
    TrainConfig,
    read_config,
)
from s2t_agents.training.evaluate import evaluate_with
from s2t_agents.training.labels import LocalTeacher
from s2t_agents.training.objectives import fresh_selector
from s2t_agents.training.probe import probe_with
from s2t_agents.training.shards import read_shards, shard_file
from s2t_agents.training.tasks import DemoTaskConfig, JsonlTask
from s2t_agents.training.train import train_with

LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from s2t_agents.cli import main
main()
"""
SMALL = Fit(k=4, rate=0.5, epochs=1, batch=4, evaluate_every=2, validation=0.3, width=16)


@pytest.fixture(scope="module")
def pair():
    return tiny_pair()


@pytest.fixture(scope="module")
def folder(pair, tmp_path_factory):
    """The pair on disk, prompts of which the second shard's are long, and a config over them."""
    folder = tmp_path_factory.mktemp("faults")
    for name, model in zip(("slm", "llm"), pair, strict=False):
        save_model(model, folder / name)
    for at, (part, count) in enumerate((("train", 12), ("heldout", 8), ("test", 4), ("again", 6))):
        write_prompts(folder / f"{part}.jsonl", count, first=1000 * at)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for row in rows[6:]:
        row["prompt"] += " and again" * 30
    (folder / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def config_file(folder: Path, out: Path, **files: str) -> Path:
    text = TOML.format(out=out, folder=folder)
    for part, name in files.items():
        text = text.replace(f"/{part}.jsonl", f"/{name}.jsonl")
    out.with_suffix(".toml").write_text(text)
    return out.with_suffix(".toml")


def limited(limit: int, *words: str) -> CompletedProcess[str]:
    """``s2t`` in a process that can write no file beyond so many bytes, as on a disk that is full."""
    return forked.run("-c", LIMITED, str(limit), *words)


@pytest.mark.slow
def test_a_shard_that_does_not_fit_on_disk_is_named_and_those_before_are_kept(folder, tmp_path):
    whole, short = config_file(folder, tmp_path / "whole", train="long"), tmp_path / "short"
    collect_config = read_config(whole).collecting("train")

    def collect(config: Path) -> None:
        """In a process of its own: two that compute the same thing from the start agree to the bit."""
        done = forked.run("-c", PIPELINE, "collect", str(config), "--part", "train")
        assert not done.returncode, done.stderr

    collect(whole)
    sizes = [shard_file(collect_config.out, number).stat().st_size for number in (0, 1)]
    assert sizes[0] < sizes[1]
    file = config_file(folder, short, train="long")
    failed = limited(sum(sizes) // 2, "collect", str(file), "--part", "train")
    assert failed.returncode == 2
    assert failed.stderr.strip().splitlines()[-1].startswith("s2t: ")
    assert "shard-00001.safetensors could not be written: File too large" in failed.stderr
    made_before = sorted(path.name for path in (short / "rollouts" / "train").iterdir())
    assert made_before == ["manifest.json", "shard-00000.safetensors"]
    collect(file)
    for path in collect_config.out.iterdir():
        assert (short / "rollouts" / "train" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_on_disk_is_named_and_the_training_goes_on_later(folder, tmp_path):
    file = config_file(folder, tmp_path / "out")
    again = f'[tasks.again]\ntask = "jsonl"\npath = "{folder}/again.jsonl"\n'
    assert again in file.read_text()
    file.write_text(file.read_text().replace(again, ""))
    config = read_config(file)
    slm = config.models.load_slm()
    collect(config.collecting("train"))
    failed = limited(2000, "train", str(file), "--kind", "head")
    assert failed.returncode == 2
    assert "checkpoint.pt could not be written: File too large" in failed.stderr
    assert [path.name for path in (tmp_path / "out" / "head").iterdir()] == ["training.json"]
    train_with(slm, config.training("head"))
    assert (tmp_path / "out" / "head" / "selector.json").exists()


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    write_whole(tmp_path / "deep" / "file", b"first")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(S2TError, match=r"file could not be written: No space left on device.*run again"):
        write_whole(tmp_path / "deep" / "file", b"second")
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "deep").iterdir()] == [("file", b"first")]


def test_a_folder_that_can_not_be_made_is_named(pair, tmp_path):
    slm, _, teacher = pair
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(S2TError, match=r"rollouts cannot be written: Not a directory"):
        collect_with(slm, teacher, prompts(tmp_path), QUICK, tmp_path / "file" / "rollouts")


def test_shards_without_a_manifest_are_not_taken_for_ones_own(pair, tmp_path):
    slm, _, teacher = pair
    collect_with(slm, teacher, prompts(tmp_path), QUICK, tmp_path / "rollouts")
    (tmp_path / "rollouts" / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="holds shards, but manifest.json is missing"):
        collect_with(slm, teacher, prompts(tmp_path), QUICK, tmp_path / "rollouts")


@pytest.mark.parametrize("who", ["slm", "llm"])
def test_a_model_that_gives_no_numbers_stops_the_collection(pair, tmp_path, who):
    broken = tiny_model(seed=7)
    broken.model.get_output_embeddings().weight.data[3] = float("nan")
    slm, teacher = (broken, pair[2]) if who == "slm" else (pair[0], LocalTeacher(broken))
    with pytest.raises(S2TError, match=r"'tiny-qwen3-7' gives log-probabilities that are no numbers"):
        collect_with(slm, teacher, prompts(tmp_path), QUICK, tmp_path / "rollouts")
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["manifest.json"]


def test_a_learning_rate_that_explodes_is_named_and_no_selector_is_left(pair, tmp_path):
    slm, _, teacher = pair
    collect_with(slm, teacher, prompts(tmp_path, 16), QUICK, tmp_path / "rollouts")
    fit = SMALL.model_copy(update={"lr": 1e30, "warmup": 0, "epochs": 9})
    config = TrainConfig(
        models=Models(), kind="activated", rollouts=(tmp_path / "rollouts",), out=tmp_path / "out", fit=fit
    )
    with pytest.raises(S2TError, match=r"(the loss is|norm) (nan|inf) at step 1; nothing was changed\. Lower lr"):
        train_with(slm, config)
    assert not (tmp_path / "out" / "selector.json").exists()


@pytest.fixture
def foreign(pair, tmp_path):
    """A selector, with a probe, of another model of the same shape; rollouts of ours."""
    slm, _, teacher = pair
    other = tiny_model(seed=9)
    selector = fresh_selector(other, "head", Fit(width=8))
    selector.save(tmp_path / "head", SelectorConfig(kind="head", base=BaseIdentity.of(other), k=4))
    save_probe(tmp_path / "head", torch.zeros(slm.torch_backend.config.hidden_size + 1), 0.0)
    collect_with(slm, teacher, prompts(tmp_path), QUICK, tmp_path / "rollouts")
    return tmp_path


def test_a_selector_of_another_base_is_refused_at_every_stage(pair, foreign):
    slm, llm, teacher = pair
    head, rollouts = foreign / "head", foreign / "rollouts"
    stages = [
        lambda: calibrate_with(slm, CalibrateConfig(selector=head, rollouts=rollouts)),
        lambda: probe_with(slm, ProbeConfig(models=Models(), selector=head, rollouts=rollouts)),
        lambda: evaluate_with(
            slm,
            llm,
            prompts(foreign, 2),
            EvaluateConfig(models=Models(), task=DemoTaskConfig(), selectors={"head": head}, rows=EvaluationRows()),
        ),
        lambda: collect_with(
            slm, teacher, prompts(foreign), QUICK.model_copy(update={"selector": head}), foreign / "again"
        ),
    ]
    for stage in stages:
        with pytest.raises(AdapterMismatch, match=r"trained for 'tiny-qwen3-9', not 'tiny-qwen3-1'.*s2t train"):
            stage()


def test_a_selector_of_another_tokenizer_is_refused(pair, foreign):
    slm = pair[0]
    config = SelectorConfig.load(foreign / "head")
    base = BaseIdentity.of(slm).model_copy(update={"tokenizer_fingerprint": "another"})
    config.model_copy(update={"base": base}).save(foreign / "head")
    with pytest.raises(AdapterMismatch, match="tokenizer_fingerprint is .* it needs 'another'"):
        calibrate_with(slm, CalibrateConfig(selector=foreign / "head", rollouts=foreign / "rollouts"))


def test_a_broken_settings_file_of_a_training_is_named(pair, foreign):
    (foreign / "out").mkdir()
    (foreign / "out" / "training.json").write_text("{")
    (foreign / "out" / "checkpoint.pt").touch()
    config = TrainConfig(models=Models(), kind="head", rollouts=(foreign / "rollouts",), out=foreign / "out", fit=SMALL)
    with pytest.raises(InputError, match=r"training.json is not JSON.*Delete the folder"):
        train_with(pair[0], config)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "caf\xe9", "answer": "1"}', "is not UTF-8"),
        (b'{"prompt": [1, 2], "answer": "1"}', "id '1' cannot be used"),
        (b'{"prompt": [{"role": "nobody", "content": "x"}], "answer": "1"}', "id '1' cannot be used"),
        (b'{"prompt": "a", "answer": "1", "tools": "f"}', "tools must be a list of objects"),
        (b'{"prompt": {"role": "user", "content": "x"}, "answer": "1"}', "id '1' cannot be used"),
        (b'{"prompt": 12, "answer": "1"}', "id '1' cannot be used"),
        (b'{"prompt": "a", "answer": "1", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 1: not JSON"),
    ],
)
def test_prompts_of_no_known_form_are_named(tmp_path, line, message):
    (tmp_path / "prompts.jsonl").write_bytes(line)
    with pytest.raises(InputError, match=message):
        JsonlTask(tmp_path / "prompts.jsonl", "numeric")


def test_line_separators_inside_a_prompt_are_text(tmp_path):
    row = {"prompt": "one\u2028two\x85three", "answer": "1"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    (item,) = JsonlTask(tmp_path / "prompts.jsonl", "numeric").items
    assert item.messages[0]["content"] == row["prompt"]


def test_a_config_that_is_no_text_is_named(tmp_path):
    (tmp_path / "config.toml").write_bytes(b"out = '\xff'")
    with pytest.raises(ConfigError, match="is not TOML"):
        read_config(tmp_path / "config.toml")


PIPELINE = "from s2t_agents.cli import main; main()"


def run_pipeline(config: Path) -> None:
    """In a process of its own: two that compute the same thing from the start agree to the bit."""
    done = forked.run("-c", PIPELINE, "pipeline", str(config))
    assert not done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kill_9_at_every_stage_and_again_ends_the_same(folder, tmp_path):
    run_pipeline(config_file(folder, tmp_path / "whole"))
    out = tmp_path / "killed"
    file = config_file(folder, out)
    reached = [
        "rollouts/train/shard-00000.safetensors",
        "first/head/checkpoint.pt",
        "rollouts/again/manifest.json",
        "activated/checkpoint.pt",
        "sufficiency/sufficiency.json",
    ]
    killed = 0
    for name in reached:
        process = forked.start("-c", PIPELINE, "pipeline", str(file))
        while process.is_alive() and not (out / name).exists():
            time.sleep(0.005)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed >= 4
    run_pipeline(file)
    for half in out.rglob(".*.part"):
        half.unlink()
    assert made(out) == made(tmp_path / "whole")
    assert len(read_shards(out / "rollouts" / "train")) == 2
