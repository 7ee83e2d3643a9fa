"""Loading: dtype and device chosen sensibly, all else passed through, nothing executed that came with weights."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from sequences import appended
from transformers.utils import logging

from s2t_agents.backends.torch import loading
from s2t_agents.bundled import LLM, SLM
from s2t_agents.errors import ConfigError, ModelNotFound, UnsafeWeights
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.selectors import load_selector
from s2t_agents.testing import ARCHITECTURES, tiny_model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = tiny_model()
    model.model.to(torch.bfloat16).save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_comes_back_from_disk_the_same(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    model.model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    again = LanguageModel.load(str(tmp_path), device="cpu")
    ids = torch.arange(9)
    ours, theirs = model.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    # Not to the bit: where the file's bytes lie in memory decides which kernel multiplies a single row.
    assert torch.allclose(
        appended(again, ids, again.new_cache())[0], appended(model, ids, model.new_cache())[0], atol=1e-5
    )
    assert (again.eos_ids, again.context_window) == (model.eos_ids, 512)


def test_a_small_model_runs_in_fp32_on_a_cpu_unless_told_otherwise(saved: Path) -> None:
    assert LanguageModel.load(str(saved), device="cpu").model.dtype == torch.float32
    assert LanguageModel.load(str(saved), device="cpu", dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_loading_draws_no_bars_and_leaves_the_setting_as_it_was(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert logging.is_progress_bar_enabled()
    LanguageModel.load(str(saved))
    with pytest.raises(ModelNotFound):
        LanguageModel.load(str(saved), quantization_config={"quant_method": "no-such-method"})
    assert "Loading weights" not in capfd.readouterr().err
    assert logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        LanguageModel.load(str(saved))
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.enable_progress_bar()


@pytest.mark.parametrize("widened", [True, False])
def test_a_larger_one_does_where_half_precision_is_slow(
    saved: Path, monkeypatch: pytest.MonkeyPatch, widened: bool
) -> None:
    def read_as() -> torch.dtype:
        dtype: torch.dtype = LanguageModel.load(str(saved), device="cpu").model.dtype
        return dtype

    monkeypatch.setattr(loading, "SMALL_ON_CPU", 0)
    monkeypatch.setattr(loading, "is_emulated", lambda dtype: widened and dtype == torch.bfloat16)
    assert read_as() == (torch.float32 if widened else torch.bfloat16)
    monkeypatch.setattr(loading, "WIDENED_ON_CPU", 0)  # not where that takes more memory than anybody expects
    assert read_as() == torch.bfloat16


def test_other_arguments_reach_from_pretrained(saved: Path) -> None:
    eager = LanguageModel.load(str(saved), attn_implementation="eager")
    assert eager.model.config._attn_implementation == "eager"
    placed = LanguageModel.load(str(saved), device="meta", device_map={"": "cpu"})
    assert placed.device.type == "cpu"  # the map decides, not our own device
    with pytest.raises(ModelNotFound, match="no causal language model"):
        LanguageModel.load(str(saved), quantization_config={"quant_method": "no-such-method"})


def test_remote_code_is_not_run(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    marker = saved / "ran"
    (saved / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"},
    }
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises((ModelNotFound, UnsafeWeights)):
        LanguageModel.load(str(saved))
    assert not marker.exists()


def test_weights_that_lack_tensors_are_refused(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(
        json.dumps({**config, "num_hidden_layers": 6, "layer_types": ["full_attention"] * 6})
    )
    with pytest.raises(UnsafeWeights, match="lack .* tensors"):
        LanguageModel.load(str(saved))


def test_what_threads_read_at_once_is_what_each_reads_alone() -> None:
    slm, alone = LanguageModel.load(SLM), LanguageModel.load(LLM).weights_fingerprint

    def read(number: int) -> bool:
        if number % 2:
            return LanguageModel.load(LLM).weights_fingerprint == alone
        selector, _ = load_selector(SLM, slm)
        return all(weight.dtype == torch.float32 for weight in selector.parameters())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(8)))
    assert torch.get_default_dtype() == torch.float32


def test_a_directory_without_weights_says_so(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(UnsafeWeights, match="holds no weights"):
        LanguageModel.load(str(saved))


def test_a_hub_id_with_the_hub_unreachable_says_what_to_do() -> None:
    with pytest.raises(ModelNotFound, match="'nobody/nothing'.*HF_HUB_OFFLINE"):
        LanguageModel.load("nobody/nothing")


@pytest.mark.parametrize(
    ("family", "options"),
    [("mamba", {"state_size": 8, "time_step_rank": 4}), ("rwkv", {"attention_hidden_size": 32})],
)
def test_a_model_that_does_not_go_on_from_a_kv_cache_is_refused_by_name(family: str, options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{family}.*does not go on from a KV cache.*hybrid"):
        tiny_model(family, **options)
