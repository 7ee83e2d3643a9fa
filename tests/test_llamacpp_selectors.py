"""Selectors for GGUF models: made from the engine's own answers, and told from other forms of the same checkpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import write_gguf
from training_fixtures import JSONL_TASKS, save_model, saved_head, tiny_pair, write_prompts
from typer.testing import CliRunner

from examples.real_pair.quantise_gguf import quantise
from s2t_agents import ChatS2T, triggers
from s2t_agents.errors import AdapterMismatch, ConfigError
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.selectors import SelectorConfig, load_selector
from s2t_agents.selectors.config import BaseIdentity
from s2t_agents.testing import tiny_model
from s2t_agents.training.commands import app
from s2t_agents.training.labels import along
from s2t_agents.training.stepwise import outputs_along

pytest.importorskip("llama_cpp")

TOML = (
    """
out = "{out}"

[models]
slm = "{slm}"
llm = "{llm}"
dtype = "float32"

"""
    + JSONL_TASKS
    + """

[collect]
k = 8
max_tokens = {max_tokens}
samples = 1
shard_items = 12

[train.head]
k = 4
width = 32
rate = 1.0
epochs = 20
lr = 5e-3
batch = 32
evaluate_every = 5
patience = 20
validation = 0.2

[calibrate]
trigger_rate = 0.4

[evaluate]
max_tokens = {max_tokens}
batch = 10
agreement = 4
budgets = [1]
llm_trigger_entropy = 0.0
"""
)


def norms(name: str, values: np.ndarray) -> np.ndarray:
    """Normalisation weights as of a trained model: no two are alike."""
    if not name.endswith("norm.weight"):
        return values
    seed = sum(map(ord, name))
    return (1 + np.random.default_rng(seed).normal(0, 0.1, values.shape)).astype(np.float32)


def other_output(name: str, values: np.ndarray) -> np.ndarray:
    """The same model with another output layer: its hidden states tell what it would say."""
    if name != "output.weight":
        return norms(name, values)
    return (values + np.random.default_rng(5).normal(0, 0.2, values.shape)).astype(np.float32)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    return {
        "F32": write_gguf(folder / "f32.gguf", weights=norms),
        "Q8_0": write_gguf(folder / "q8.gguf", kind="Q8_0", weights=norms),
        "tuned": write_gguf(folder / "tuned.gguf", kind="Q8_0", seed=4, weights=norms),
        "llm": write_gguf(folder / "llm.gguf", weights=other_output),
    }


def config(folder: Path, slm: Path, llm: Path, max_tokens: int = 12, counts: Sequence[int] = (24, 10, 5)) -> Path:
    for at, (part, count) in enumerate(zip(("train", "heldout", "test"), counts, strict=True)):
        write_prompts(folder / f"{part}.jsonl", count, first=100 * at)
    file = folder / "pair.toml"
    file.write_text(TOML.format(out=folder / "made", folder=folder, slm=slm, llm=llm, max_tokens=max_tokens))
    return file


def run(*arguments: str) -> Any:
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def made(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the commands make of a pair of GGUF files."""
    folder = tmp_path_factory.mktemp("made")
    file = config(folder, files["Q8_0"], files["llm"])
    for stage in ("collect", "train", "calibrate"):
        run(stage, str(file))
    return folder / "made"


def test_a_head_that_was_trained_on_a_gguf_file_changes_what_it_says(made: Path, files: dict[str, Path]) -> None:
    kept = SelectorConfig.load(made / "head")
    assert kept.training["agreement"] > kept.training["agreement_untrained"]
    assert (kept.base.backend, kept.base.quantization) == ("llama.cpp", "Q8_0")
    plain = ChatS2T(model=str(files["Q8_0"]), max_tokens=12)
    corrected = ChatS2T(
        model=str(files["Q8_0"]), selector=str(made / "head"), trigger=triggers.entropy(above=0.0), max_tokens=12
    )
    prompts = [f"{at} + {at}?" for at in range(8)]
    assert [corrected.invoke(each).content for each in prompts] != [plain.invoke(each).content for each in prompts]
    said = corrected.invoke(prompts[0]).response_metadata["s2t"]
    assert said["selections"] == said["triggers"] > 0


def test_the_table_holds_all_that_the_engine_can_answer(made: Path) -> None:
    report = run("eval", str(made.parent / "pair.toml"))
    rows = report["rows"]
    assert list(rows) == ["slm", "maj8", "random", "head", "llm_select", "takeover", "hybrid_1", "llm"]
    assert rows["slm"]["llm_calls"] == rows["head"]["llm_calls"] == 0
    assert rows["llm_select"]["llm_calls"] == rows["llm_select"]["tokens"] > 1
    assert rows["llm_select"]["agreement"] > 0.9  # a batch rounds otherwise than a single answer
    assert rows["hybrid_1"]["llm_calls"] <= 1


def test_a_checkpoint_is_taught_by_a_gguf_file(files: dict[str, Path], tmp_path: Path) -> None:
    slm, _, _ = tiny_pair()
    file = config(tmp_path, save_model(slm, tmp_path / "slm"), files["llm"], max_tokens=6)
    manifest = run("collect", str(file))[0]
    assert manifest["llm"]["weights_fingerprint"].startswith("gguf-")
    assert not manifest["slm"]["weights_fingerprint"].startswith("gguf-")


def test_answers_are_read_as_they_are_read_in_bulk() -> None:
    model = tiny_model("qwen3", seed=1)
    rows = [([1, 2, 3], [4, 5, 6, 7]), ([1, 2, 3], [9]), ([8, 2], [4, 4])]
    ours = outputs_along(model, rows, lambda output: output.logits.log_softmax(-1))
    for one, other in zip(ours, along(model, rows), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.fixture
def head(files: dict[str, Path], tmp_path: Path) -> Path:
    """A head for the file of 8 bits."""
    return saved_head(LanguageModel.load(str(files["Q8_0"]), n_ctx=512), tmp_path)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    ours = [record for record in caplog.records if record.name.startswith("s2t_agents")]
    return [record.getMessage() for record in ours if record.levelno == logging.WARNING]


def test_its_own_base_is_no_news(head: Path, files: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    load_selector(head, LanguageModel.load(str(files["Q8_0"]), n_ctx=512))
    assert not warnings(caplog)


def test_another_quantization_is_told_once_and_measured(
    head: Path, files: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    ChatS2T(model=str(files["F32"]), selector=str(head), trigger=triggers.entropy(above=0.0), max_tokens=4).invoke(
        "hello"
    )
    (said,) = warnings(caplog)
    assert "(llama.cpp, Q8_0)" in said
    assert "(llama.cpp, F32)" in said
    agreement = int(said.partition("agree at ")[2].partition("%")[0])
    assert 60 <= agreement <= 100
    assert 0 < float(said.partition("differ by ")[2].partition(" nats")[0]) < 0.5


def test_a_selector_without_a_reference_says_that_the_difference_is_not_known(
    head: Path, files: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    (head / "reference.safetensors").unlink()
    load_selector(head, LanguageModel.load(str(files["F32"]), n_ctx=512))
    (said,) = warnings(caplog)
    assert "not known" in said


def test_other_weights_are_refused_whatever_their_quantization(head: Path, files: dict[str, Path]) -> None:
    with pytest.raises(AdapterMismatch, match="weights_fingerprint"):
        load_selector(head, LanguageModel.load(str(files["tuned"]), n_ctx=512))
    with pytest.raises(AdapterMismatch):
        load_selector(head, tiny_model("llama"))


def test_a_selector_of_an_older_version_fits_the_very_same_weights_alone(head: Path, files: dict[str, Path]) -> None:
    file = head / "selector.json"
    kept = json.loads(file.read_text())
    for name in ("backend", "quantization", "checkpoint_fingerprint"):
        del kept["base"][name]
    file.write_text(json.dumps(kept))
    assert SelectorConfig.load(head).base.backend is None
    load_selector(head, LanguageModel.load(str(files["Q8_0"]), n_ctx=512))
    with pytest.raises(AdapterMismatch, match="weights_fingerprint"):
        load_selector(head, LanguageModel.load(str(files["F32"]), n_ctx=512))


def test_norms_that_were_never_trained_tell_nothing(tmp_path: Path) -> None:
    model = LanguageModel.load(str(write_gguf(tmp_path / "a.gguf")), n_ctx=512)
    assert model.checkpoint_fingerprint is None


def test_llama_cpps_own_quantiser_makes_another_form_of_the_checkpoint(files: dict[str, Path], tmp_path: Path) -> None:
    quantise(files["F32"], tmp_path / "few.gguf", "Q4_0")
    few, whole = (LanguageModel.load(str(file), n_ctx=512) for file in (tmp_path / "few.gguf", files["F32"]))
    assert "Q4_0" in few.quantization
    assert few.checkpoint_fingerprint == whole.checkpoint_fingerprint is not None
    assert BaseIdentity.of(few).is_another_form_of(BaseIdentity.of(whole))
    with pytest.raises(ConfigError, match="Q9_Z"):
        quantise(files["F32"], tmp_path / "none.gguf", "Q9_Z")


def test_adapters_are_refused_with_the_way_out(files: dict[str, Path], tmp_path: Path) -> None:
    file = config(tmp_path, files["Q8_0"], files["llm"], max_tokens=4)
    file.write_text(file.read_text().replace("[train.head]", "[train.activated]"))
    run("collect", str(file))
    done = CliRunner().invoke(app, ["train", str(file)])
    assert done.exit_code == 2
    assert "head selector" in done.output


@pytest.mark.real
def test_a_head_for_smollm2s_file_is_made_and_fits_its_checkpoint(
    smollm2_gguf: Path, smollm2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = config(tmp_path, smollm2_gguf, smollm2, max_tokens=5, counts=(6, 2, 1))
    file.write_text(file.read_text().replace("epochs = 20", "epochs = 2").replace("samples = 1\n", ""))
    for stage in ("collect", "train", "calibrate"):
        run(stage, str(file))
    head = tmp_path / "made" / "head"
    assert SelectorConfig.load(head).base.quantization == "Q4_1, Q8_0"
    said = ChatS2T(model=str(smollm2_gguf), selector=str(head), max_tokens=8).invoke("2 + 2?")
    assert said.response_metadata["s2t"]["tokens"] > 0
    assert not warnings(caplog)
    load_selector(head, LanguageModel.load(str(smollm2)))
    (told,) = warnings(caplog)
    assert "(llama.cpp, Q4_1, Q8_0)" in told
    assert "(torch, none)" in told
    assert int(told.partition("agree at ")[2].partition("%")[0]) >= 75
