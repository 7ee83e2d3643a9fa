"""Weights laid out beforehand say what the modules say, row for row, and follow whatever is done to the modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sequences import appended
from torch import Tensor, nn
from torch.nn import functional
from torch_models import runner

from s2t_agents.backends.torch.cpu_features import supports_packed_weights
from s2t_agents.backends.torch.llama_decoder import llama_decoder_of
from s2t_agents.backends.torch.packed_linear import LEAST, FusedLinear, PackedLinears, gains
from s2t_agents.testing import tiny_config, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif(not supports_packed_weights(torch.float32), reason="torch was built without oneDNN")

DTYPES = [torch.float32, torch.bfloat16]


def layer(dtype: torch.dtype, bias: bool = True, out: int = 640, width: int = 512) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, out, bias=bias).to(dtype).requires_grad_(False)


def exactly(module: nn.Linear, x: Tensor) -> Tensor:
    return functional.linear(x.double(), module.weight.double(), None if module.bias is None else module.bias.double())


def tolerance(dtype: torch.dtype) -> float:
    return 1e-4 if dtype == torch.float32 else 2e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 8, 33])
def test_it_is_the_modules_own_map(dtype: torch.dtype, bias: bool, rows: int) -> None:
    module = layer(dtype, bias)
    fused = FusedLinear(module)
    packed = PackedLinears([fused])
    assert packed.packed == supports_packed_weights(dtype)
    x = torch.randn(rows, 512, dtype=dtype)
    with torch.inference_mode():
        (said,) = packed(fused, x)
        assert torch.allclose(said.double(), exactly(module, x), atol=tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("out", [8, 640])  # held as they are, and laid out
def test_a_joint_is_its_modules_maps(dtype: torch.dtype, bias: bool, out: int) -> None:
    modules = [layer(dtype, bias, out=each) for each in (out, out // 2, out // 2)]
    fused = FusedLinear(*modules)
    packed = PackedLinears([fused, FusedLinear(layer(dtype, bias, out=out))])
    x = torch.randn(3, 512, dtype=dtype)
    with torch.inference_mode():
        for said in (packed(fused, x), fused(x)):
            for module, each in zip(modules, said, strict=True):
                assert torch.allclose(each.double(), exactly(module, x), atol=tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_among_others_is_the_row_alone(dtype: torch.dtype) -> None:
    fused = FusedLinear(layer(dtype))
    packed = PackedLinears([fused])
    x = torch.randn(8, 512, dtype=dtype)
    with torch.inference_mode():
        alone = torch.cat([packed(fused, row[None])[0] for row in x])
        (together,) = packed(fused, x)
        assert torch.allclose(together.float(), alone.float(), atol=1e-5 if dtype == torch.float32 else 1e-2)
        assert torch.equal(together, alone) or not packed.rows_alike


@pytest.mark.parametrize("out", [8, 640])  # held as they are, and laid out
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_weights_written_to_or_replaced_later_count(out: int, name: str) -> None:
    one, other = layer(torch.float32, out=out), layer(torch.float32, out=out)
    fused, x = FusedLinear(one, other), torch.randn(1, 512)
    packed = PackedLinears([fused])
    assert len(packed) == 1

    def follows() -> bool:
        return all(map(torch.equal, packed(fused, x), (one(x), other(x))))

    with torch.no_grad():
        getattr(other, name).mul_(2)
    assert follows()
    setattr(one, name, nn.Parameter(torch.randn_like(getattr(one, name))))
    assert follows()


def test_past_the_limit_nothing_is_held_twice() -> None:
    fused_linears = [FusedLinear(layer(torch.float32)), FusedLinear(layer(torch.float32))]
    size = fused_linears[0].modules[0].weight.nbytes
    assert len(PackedLinears(fused_linears, limit=2 * size)) == 2
    assert len(PackedLinears(fused_linears, limit=2 * size - 1)) == 0


def test_all_weights_of_a_model_are_laid_out_or_none() -> None:
    little, large = FusedLinear(layer(torch.float32, out=8)), FusedLinear(layer(torch.float32, out=2000))
    assert PackedLinears([little, large]).packed  # it is the average that counts
    assert not PackedLinears([*[FusedLinear(layer(torch.float32, out=8)) for _ in range(9)], large]).packed
    assert not PackedLinears([FusedLinear(layer(torch.bfloat16)), large]).packed
    assert not PackedLinears([]).packed


def test_what_neither_gains_nor_is_small_is_not_held_twice() -> None:
    assert len(PackedLinears([FusedLinear(layer(torch.float64))])) == 0
    assert len(PackedLinears([FusedLinear(nn.Linear(1024, 1024, device="meta"))])) == 0


def test_small_weights_and_other_dtypes_stay_as_they_are() -> None:
    side = int(LEAST[torch.float32] ** 0.5)
    assert gains([torch.zeros(side + 1, side + 1)])
    assert not gains([torch.zeros(side - 1, side - 1)])
    assert not gains([torch.zeros(1024, 1024, dtype=torch.float16)])
    assert not gains([torch.zeros(1024, 1024, dtype=torch.float64)])
    assert not gains([torch.zeros(1024, 1024, device="meta")])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_models_lean_step_uses_them_and_says_what_the_model_says(dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    from s2t_agents.scheduling.language_model import LanguageModel

    wide = {"hidden_size": 512, "intermediate_size": 2560, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    raw = AutoModelForCausalLM.from_config(tiny_config("qwen2", **wide)).to(dtype).eval().requires_grad_(False)
    step = llama_decoder_of(raw)
    assert step is not None
    assert step.linear.packed == supports_packed_weights(dtype)
    plain = LanguageModel(raw, tiny_tokenizer(), name="plain", prepack=0)
    packed = LanguageModel(raw, tiny_tokenizer(), name="packed")
    said = []
    for model in (plain, packed):
        cache = model.new_cache()
        appended(model, torch.tensor([3, 4, 5]), cache)
        said.append(torch.stack([appended(model, torch.tensor([token]), cache)[0] for token in (7, 8, 9)]))
    assert torch.allclose(*said, atol=1e-4 if dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize("bias", [True, False])
def test_weights_laid_one_after_another_stay_the_modules_own(bias: bool) -> None:
    modules = nn.ModuleList([layer(torch.float32, bias, out=each) for each in (6, 4, 4)])
    before = {name: value.clone() for name, value in modules.state_dict().items()}
    with torch.inference_mode():  # where a model's first step happens
        weight, whole_bias = FusedLinear(*modules).adjoin()
    assert (whole_bias is not None) == bias
    for name, value in modules.state_dict().items():
        assert torch.equal(value, before[name])
    modules[1].weight.data.mul_(2)  # type: ignore[operator, union-attr]
    assert torch.equal(weight, torch.cat([module.weight for module in modules]))  # type: ignore[misc]
    assert weight.data_ptr() == modules[0].weight.data_ptr()  # type: ignore[operator, union-attr]


def test_a_model_with_weights_one_after_another_says_and_saves_what_it_did(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    ids = torch.arange(12)[None]
    assert runner(model).llama_decoder is not None
    with torch.inference_mode():
        before = model.model(ids).logits
        for fused in runner(model).llama_decoder.fused_linears:
            fused.adjoin()
        assert torch.equal(model.model(ids).logits, before)
    model.model.save_pretrained(tmp_path)
    again = type(model.model).from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, before)


@pytest.mark.parametrize("out", [8, 640])  # held as they are, and laid out
def test_a_joints_whole_product_is_its_modules_one_after_another(out: int) -> None:
    modules = [layer(torch.float32, out=each) for each in (out, out // 2)]
    fused, x = FusedLinear(*modules), torch.randn(3, 512)
    packed = PackedLinears([fused])
    expected = torch.cat([exactly(module, x) for module in modules], -1)
    for _ in range(2):
        with torch.inference_mode():
            assert torch.allclose(packed.whole(fused, x).double(), expected, atol=1e-4)
        modules[0].weight.data = modules[0].weight.data.clone()  # from here on what was copied is out of date
