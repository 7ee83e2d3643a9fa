"""The lean LoRA computes what PEFT computes, reads and writes PEFT's files, and vanishes outside its block."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
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
