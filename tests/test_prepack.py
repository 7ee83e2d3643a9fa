"""Weights laid out beforehand say what the modules say, row for row, and follow whatever is done to the modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from s2t_agents.models.lean import lean_step_of
from s2t_agents.models.prepack import LEAST, Prepacked, gains
from s2t_agents.models.processor import lays_out
from s2t_agents.testing import tiny_config, tiny_tokenizer

pytestmark = pytest.mark.skipif(not lays_out(torch.float32), reason="this torch was built without oneDNN")

DTYPES = [torch.float32, torch.bfloat16]


def layer(dtype: torch.dtype, bias: bool = True, out: int = 640, width: int = 512) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, out, bias=bias).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 8, 33])
def test_it_is_the_modules_own_map(dtype: torch.dtype, bias: bool, rows: int) -> None:
    module = layer(dtype, bias)
    packed = Prepacked([module])
    assert len(packed) == int(lays_out(dtype))
    x = torch.randn(rows, 512, dtype=dtype)
    exact = functional.linear(x.double(), module.weight.double(), module.bias.double() if bias else None)
    with torch.inference_mode():
        assert torch.allclose(packed(module, x).double(), exact, atol=1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_among_others_is_the_row_alone(dtype: torch.dtype) -> None:
    module = layer(dtype)
    packed = Prepacked([module])
    x = torch.randn(8, 512, dtype=dtype)
    with torch.inference_mode():
        alone = torch.cat([packed(module, row[None]) for row in x])
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        assert torch.allclose(packed(module, x).float(), alone.float(), atol=tolerance)


def test_weights_written_to_or_replaced_later_count() -> None:
    module = layer(torch.float32)
    packed, x = Prepacked([module]), torch.randn(1, 512)
    assert len(packed) == 1
    with torch.no_grad():
        module.weight.mul_(2)
    assert torch.equal(packed(module, x), module(x))
    module.weight = nn.Parameter(torch.randn(640, 512))
    assert torch.equal(packed(module, x), module(x))


def test_past_the_limit_nothing_is_held_twice() -> None:
    modules = [layer(torch.float32), layer(torch.float32)]
    size = modules[0].weight.nbytes
    assert len(Prepacked(modules, limit=2 * size)) == 2
    assert len(Prepacked(modules, limit=2 * size - 1)) == 0


def test_all_weights_of_a_model_lie_there_or_none() -> None:
    small, large = layer(torch.float32, out=8), layer(torch.float32, out=2000)
    assert len(Prepacked([small])) == 0
    assert len(Prepacked([small, large])) == 2  # it is the average that counts
    assert len(Prepacked([small] * 9 + [large])) == 0
    assert len(Prepacked([layer(torch.bfloat16), large])) == 0
    assert len(Prepacked([])) == 0


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

    from s2t_agents.models.language_model import LanguageModel

    wide = {"hidden_size": 512, "intermediate_size": 2560, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    raw = AutoModelForCausalLM.from_config(tiny_config("qwen2", **wide)).to(dtype).eval().requires_grad_(False)
    step = lean_step_of(raw)
    assert step is not None
    assert len(step.linear) > 0 or not lays_out(dtype)  # type: ignore[arg-type]
    plain = LanguageModel(raw, tiny_tokenizer(), name="plain", prepack=0)
    packed = LanguageModel(raw, tiny_tokenizer(), name="packed")
    said = []
    for model in (plain, packed):
        cache = model.new_cache()
        model.step(torch.tensor([3, 4, 5]), cache)
        said.append(torch.stack([model.step(torch.tensor([token]), cache)[0] for token in (7, 8, 9)]))
    assert torch.allclose(*said, atol=1e-4 if dtype == torch.float32 else 5e-2)
