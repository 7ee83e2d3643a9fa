"""The lean LoRA computes what PEFT computes, reads and writes PEFT's files, and vanishes outside its block."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from s2t_agents.backends.torch.lora import Lora
from s2t_agents.errors import AdapterMismatch, UnsafeWeights
from s2t_agents.testing import ARCHITECTURES, tiny_model

IDS = torch.arange(10)[None]


def trained(model: torch.nn.Module, targets: list[str]) -> Lora:
    """An adapter that changes something."""
    torch.manual_seed(0)
    lora = Lora.fresh(model, targets=targets, rank=4, alpha=8)
    for layer in lora.layers:
        torch.nn.init.normal_(layer.b, std=0.5)
    return lora.requires_grad_(False)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saved_adapter_gives_peft_the_same_logits(name: str, tmp_path: Path) -> None:
    model = tiny_model(name).model
    targets = ["qkv_proj", "down_proj"] if name == "phi3" else ["q_proj", "v_proj", "down_proj"]
    lora = trained(model, targets)
    plain = model(IDS).logits
    with lora.on(model):
        ours = model(IDS).logits
    assert torch.equal(model(IDS).logits, plain)
    assert (ours - plain).abs().max() > 1e-2
    lora.save(tmp_path, base_name="tiny")
    again = Lora.load(tmp_path, model)
    with again.on(model):
        assert torch.equal(model(IDS).logits, ours)
    peft = PeftModel.from_pretrained(model, tmp_path)
    assert torch.allclose(peft(IDS).logits, ours, atol=1e-5)


def test_the_block_ends_on_errors_too() -> None:
    model = tiny_model().model
    plain = model(IDS).logits
    with pytest.raises(RuntimeError, match="stop"), trained(model, ["q_proj"]).on(model):
        raise RuntimeError("stop")
    assert torch.equal(model(IDS).logits, plain)


def test_a_fresh_adapter_changes_nothing() -> None:
    model = tiny_model().model
    plain = model(IDS).logits
    with Lora.fresh(model, targets=["q_proj"], rank=4, alpha=8).on(model):
        assert torch.equal(model(IDS).logits, plain)


def test_an_adapter_of_another_size_is_refused_by_name(tmp_path: Path) -> None:
    trained(tiny_model("qwen3").model, ["q_proj"]).save(tmp_path, base_name="tiny")
    with pytest.raises(AdapterMismatch, match=r"layers\.0\.self_attn\.q_proj maps 32 to 32, the base's 64 to"):
        Lora.load(tmp_path, tiny_model("qwen3", hidden_size=64).model)


def test_an_adapter_for_layers_that_are_not_there_is_refused(tmp_path: Path) -> None:
    trained(tiny_model("qwen3").model, ["q_proj"]).save(tmp_path, base_name="tiny")
    with pytest.raises(AdapterMismatch, match="does not have"):
        Lora.load(tmp_path, tiny_model("phi3").model)
    with pytest.raises(AdapterMismatch, match="no linear layer"):
        Lora.fresh(tiny_model("phi3").model, targets=["q_proj"], rank=4, alpha=8)


def test_corrupt_weights_are_refused(tmp_path: Path) -> None:
    model = tiny_model().model
    trained(model, ["q_proj"]).save(tmp_path, base_name="tiny")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x80\x04 a pickle, say")
    with pytest.raises(UnsafeWeights, match="not readable safetensors"):
        Lora.load(tmp_path, model)
    save_file({"half": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterMismatch):
        Lora.load(tmp_path, model)


def by_peft(model: torch.nn.Module, folder: Path, **options: Any) -> torch.Tensor:
    """Save an adapter of PEFT's with random matrices; the logits of the base with it."""
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "down_proj"]
    peft = get_peft_model(
        copy.deepcopy(model), LoraConfig(target_modules=targets, **{"r": 4, "lora_alpha": 8} | options)
    )
    for name, weight in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    peft.save_pretrained(folder)
    logits: torch.Tensor = peft.eval()(IDS).logits.detach()
    return logits


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 32}},
        {"rank_pattern": {r"layers\.1\.self_attn\..*": 8}},
        {"alpha_pattern": {r"^model\.layers\.0\.mlp\.down_proj": 3, "down_proj": 40, "q_pr": 99}},
        {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}, "use_rslora": True},
        {"bias": "all"},  # of a base that has none
        {"init_lora_weights": "gaussian", "lora_dropout": 0.5, "layers_to_transform": [1], "layers_pattern": "layers"},
    ],
)
def test_an_adapter_of_peft_gives_the_same_logits_here_and_when_it_is_saved_again(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_model().model
    theirs = by_peft(model, tmp_path / "theirs", **options)
    lora = Lora.load(tmp_path / "theirs", model)
    with lora.on(model):
        ours = model(IDS).logits
    assert (ours - model(IDS).logits).abs().max() > 1e-2
    assert torch.allclose(ours, theirs, atol=1e-5)
    lora.save(tmp_path / "ours", base_name="tiny")
    assert torch.allclose(
        PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours")(IDS).logits, theirs, atol=1e-5
    )


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1, 2]},
        {"alora_invocation_tokens": [3, 4], "task_type": "CAUSAL_LM"},
        {"layer_replication": [(0, 2), (0, 2)]},
    ],
    ids=lambda options: next(iter(options)) + str(next(iter(options.values()))),
)
def test_what_is_no_plain_lora_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model().model
    by_peft(model, tmp_path, **options)
    with pytest.raises(AdapterMismatch, match="no plain LoRA|not that of a plain LoRA") as refused:
        Lora.load(tmp_path, model)
    assert next(iter(options)) in str(refused.value)


def test_another_kind_of_adapter_is_refused_though_its_matrices_have_the_same_names(tmp_path: Path) -> None:
    model = tiny_model().model
    config = AdaLoraConfig(target_modules=["q_proj"], total_step=10, init_r=4, target_r=4)
    get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterMismatch, match="peft_type"):
        Lora.load(tmp_path, model)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"r": 8}, "rank 4 and 4; its config says 8"),
        ({"r": None}, "r: "),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"rank_pattern": {"(": 4}}, "no pattern"),
        ({"alpha_pattern": {r"(\w|[\w.]|[a-z])+\d": 4}}, "no pattern"),
        ({"use_something_new": True}, "use_something_new=True"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config"),
    ],
)
def test_a_config_that_does_not_fit_its_matrices_is_refused(
    change: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    model = tiny_model().model
    trained(model, ["q_proj"]).save(tmp_path, base_name="tiny")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(AdapterMismatch, match=problem):
        Lora.load(tmp_path, model)


@pytest.mark.parametrize(
    "more",
    [
        {"peft_type": None, "init_lora_weights": None, "bias": None, "rank_pattern": None, "use_rslora": None},
        {"tags": ["a"], "training_args": {"lr": 1}, "is_prepared": True, "merge_weights": True, "use_dora": False},
        {"eva_config": {"rho": 2.0}, "corda_config": {"a": 1}, "loftq_config": {"bits": 4}, "auto_mapping": {"a": "b"}},
    ],
)
def test_what_changes_nothing_is_taken(more: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model().model
    trained(model, ["q_proj"]).save(tmp_path, base_name="tiny")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    assert Lora.load(tmp_path, model).names


@pytest.mark.parametrize("text", [None, "", "{", "[]", "null"])
def test_an_unreadable_config_is_refused(text: str | None, tmp_path: Path) -> None:
    model = tiny_model().model
    trained(model, ["q_proj"]).save(tmp_path, base_name="tiny")
    file = tmp_path / "adapter_config.json"
    file.unlink()
    if text is not None:
        file.write_text(text)
    with pytest.raises(AdapterMismatch, match="adapter_config"):
        Lora.load(tmp_path, model)
