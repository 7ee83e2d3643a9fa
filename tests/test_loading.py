"""Loading: dtype and device chosen sensibly, all else passed through, nothing executed that came with weights."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sequences import appended
from servers import CompletionServer
from transformers import AutoModelForSequenceClassification, GenerationConfig
from transformers.utils import logging
from typer.testing import CliRunner

from s2t_agents import ChatS2T
from s2t_agents.backends.torch import loading
from s2t_agents.bundled import LLM, SLM
from s2t_agents.cli import app
from s2t_agents.errors import ConfigError, ModelNotFound, UnsafeWeights
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.selectors import load_selector
from s2t_agents.testing import ARCHITECTURES, tiny_config, tiny_model, tiny_tokenizer


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


def with_config(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelname == "WARNING" and "s2t" in each.name]


# ------------------------------------------------------------------ generation configs

FOLLOWED_NOWHERE: list[dict[str, Any]] = [
    {"repetition_penalty": 1.1},
    {"encoder_repetition_penalty": 1.5},
    {"no_repeat_ngram_size": 3},
    {"encoder_no_repeat_ngram_size": 3},
    {"suppress_tokens": [5]},
    {"begin_suppress_tokens": [5, 6]},
    {"bad_words_ids": [[7, 8]]},
    {"sequence_bias": [[[7], -5.0]]},
    {"forced_bos_token_id": 0},
    {"forced_eos_token_id": 258},
    {"min_new_tokens": 4},
    {"stop_strings": ["\n\n"]},
]


@pytest.mark.parametrize("in_code", [False, True])
@pytest.mark.parametrize("settings", FOLLOWED_NOWHERE, ids=lambda each: next(iter(each)))
def test_a_generation_config_that_would_change_greedy_answers_is_told_once(
    settings: dict[str, Any], in_code: bool, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"generation_config": GenerationConfig(eos_token_id=258, **settings)} if in_code else {}
    if not in_code:
        (saved / "generation_config.json").write_text(json.dumps({"eos_token_id": 258, **settings}))
    model = ChatS2T(model=str(saved), model_kwargs=options, max_tokens=6)
    answer = model.invoke("hello").content
    [(name, value)] = settings.items()
    [told] = warnings_of(caplog)
    assert f"{name}={value!r}" in told
    assert ("stop=" in told) == (name == "stop_strings")
    assert answer == ChatS2T(model=LanguageModel.load(str(saved), **options), max_tokens=6).invoke("hello").content


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "suppress_tokens": [], "num_beams": 1},
        {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_new_tokens": 2048},
        {"bos_token_id": 0, "pad_token_id": 256, "transformers_version": "4.51.0"},
    ],
)
def test_one_that_would_not_is_no_warning(
    settings: dict[str, Any], saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (saved / "generation_config.json").write_text(json.dumps({"eos_token_id": 258, **settings}))
    LanguageModel.load(str(saved))
    assert warnings_of(caplog) == []


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({"eos_token_id": [5, 6]}, None, {5, 6}),
        ({"eos_token_id": 5}, None, {5}),
        ({"eos_token_id": [5, 6]}, {"eos_token_id": [7]}, {7}),
        ({"eos_token_id": [5, 6]}, {}, set()),
        ({"eos_token_id": None}, None, set()),
    ],
)
def test_a_served_model_has_the_end_tokens_that_it_would_have_here(
    config: dict[str, Any], generation: dict[str, Any] | None, ends: set[int], saved: Path, server: CompletionServer
) -> None:
    with_config(saved, **config)
    (saved / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (saved / "generation_config.json").write_text(json.dumps(generation))
    assert LanguageModel.load(str(saved)).eos_ids == {*ends, 258}  # 258: the tokenizer's
    address = f"vllm://127.0.0.1:{server.server_port}/{server.model.name}"
    assert LanguageModel.load(address, tokenizer=str(saved)).eos_ids == {*ends, 258}


@pytest.mark.parametrize("generation", [None, {}, {"eos_token_id": [5, 6]}])
@pytest.mark.parametrize("given", [7, [7, 8]])
def test_end_tokens_that_are_given_in_code_go_before_those_of_files(
    given: Any, generation: dict[str, Any] | None, saved: Path
) -> None:
    (saved / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (saved / "generation_config.json").write_text(json.dumps(generation))
    model = ChatS2T(model=str(saved), model_kwargs={"eos_token_id": given})
    assert model.engine.slm.eos_ids == {*([given] if isinstance(given, int) else given), 258}


# ------------------------------------------------------------------ checkpoints of another kind


@pytest.mark.parametrize("tied", [False, True])
def test_a_reward_model_is_refused_by_its_class(tied: bool, tmp_path: Path) -> None:
    config = tiny_config("qwen2", tie_word_embeddings=tied, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelNotFound, match="no causal language model.*Qwen2ForSequenceClassification"):
        ChatS2T(model=str(tmp_path)).invoke("hello")
    refused = CliRunner().invoke(app, ["doctor", "--model", str(tmp_path)])
    assert isinstance(refused.exception, ModelNotFound)


@pytest.mark.parametrize(
    ("classes", "loads"),
    [
        (["Qwen3ForTokenClassification"], False),
        (["Qwen3ForQuestionAnswering"], False),
        (["BertForMaskedLM"], False),
        (["BertForMultipleChoice"], False),
        (["BertForPreTraining"], False),
        (["Qwen2ForRewardModel"], False),
        (["Qwen3ForSequenceClassification", "Qwen3ForTokenClassification"], False),
        (["Qwen3ForSequenceClassification", "Qwen3ForCausalLM"], True),
        (["SomebodysLMHeadModel"], True),
        (["Qwen3Model"], True),
        ([], True),
        (None, True),
    ],
    ids=str,
)
def test_a_class_that_is_known_to_write_no_text_is_refused_and_others_load(
    classes: list[str] | None, loads: bool, saved: Path
) -> None:
    with_config(saved, architectures=classes)
    if loads:
        assert LanguageModel.load(str(saved)).eos_ids == {258}
        return
    with pytest.raises(ModelNotFound, match=str(classes[0] if classes else None)):
        LanguageModel.load(str(saved))


@pytest.mark.parametrize(
    ("config", "written"),
    [
        ({"use_bidirectional_attention": True}, False),
        ({"use_bidirectional_attention": "all"}, False),
        ({"is_causal": False}, False),
        ({"use_bidirectional_attention": False, "is_causal": True}, True),
        ({"use_bidirectional_attention": "vision"}, True),
        ({"use_bidirectional_attention": None}, True),
    ],
    ids=str,
)
def test_a_model_that_reads_both_ways_is_refused(config: dict[str, Any], written: bool, saved: Path) -> None:
    with_config(saved, **config)
    if written:
        assert LanguageModel.load(str(saved)).eos_ids == {258}
        return
    with pytest.raises(ModelNotFound, match=r"left to right.*says"):
        LanguageModel.load(str(saved))


@pytest.mark.parametrize(
    ("name", "config"), [("gemma3", {"use_bidirectional_attention": True}), ("llama", {"is_causal": False})]
)
def test_so_is_one_that_was_made_in_code(name: str, config: dict[str, Any]) -> None:
    with pytest.raises(ModelNotFound, match="left to right"):
        tiny_model(name, **config)


def with_tensors(folder: Path, *names: str) -> Path:
    file = folder / "model.safetensors"
    save_file({**load_file(file), **{name: torch.ones(3) for name in names}}, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["score.weight"], "1 tensors"),
        (["model.layers.0.self_attn.q_proj.bias"], "1 tensors"),
        ([f"model.layers.{at}.self_attn.{each}_proj.bias" for at in range(4) for each in "qkv"], "12 tensors"),
        (["model.layers.4.mlp.up_proj.weight", "model.layers.5.eh_proj.weight"], "1 tensors"),  # no layer of drafts
    ],
    ids=len,
)
def test_tensors_without_a_place_are_told_once_and_three_are_named(
    names: list[str], told: str, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    LanguageModel.load(str(with_tensors(saved, *names)))
    [warned] = warnings_of(caplog)
    assert told in warned
    assert sum(name in warned for name in names) == min(3, int(told.split()[0]))


@pytest.mark.parametrize(
    "names",
    [
        ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.cos_cached"],
        [
            "model.layers.4.eh_proj.weight",
            "model.layers.4.mlp.up_proj.weight",
            "model.layers.4.shared_head.norm.weight",
        ],
        ["mtp.fc.weight", "model.mtp_layers.0.norm.weight"],
        [
            "vision_tower.blocks.0.weight",
            "visual.merger.bias",
            "model.audio_tower.x.weight",
            "multi_modal_projector.a.b",
        ],
        ["transformer.h.0.attn.masked_bias", "model.embeddings.position_ids"],
    ],
    ids=lambda names: names[0],
)
def test_those_that_change_no_answer_are_not(names: list[str], saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    LanguageModel.load(str(with_tensors(saved, *names)))
    assert warnings_of(caplog) == []
