"""Triton's kernels, run by its interpreter: products, and steps and selections as the eager ones. Needs Triton."""

from __future__ import annotations

import math
import os
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch_models import runner

from s2t_agents.backends.torch.cuda.cuda_graph import played
from s2t_agents.backends.torch.cuda.graph_runner import GraphRunner, agrees, graph_builders
from s2t_agents.backends.torch.fused_ops import rotary_embedding
from s2t_agents.testing import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*(overflow|invalid value|divide by zero).*:RuntimeWarning")

SHAPES: list[tuple[int, int, int, int, int, list[int], int]] = [
    # d, heads, key heads, rows, candidates of each (0: a token joins), tokens in the rows, window (0: none)
    (32, 6, 2, 2, 0, [130, 0], 0),
    (24, 4, 4, 1, 0, [200], 0),
    (16, 14, 2, 3, 0, [64, 63, 511], 70),
    (32, 3, 1, 2, 0, [130, 1], 1),
    (24, 4, 4, 1, 8, [200], 0),
    (32, 6, 2, 1, 16, [130], 50),
]


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET=1 is not set; it is read when Triton is imported")
    from s2t_agents.backends.torch.cuda import triton_decode

    return triton_decode


@pytest.mark.parametrize(("n_in", "n_out"), [(64, 70), (200, 3), (1500, 33)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_product_of_one_row(kernels: ModuleType, n_in: int, n_out: int, with_bias: bool) -> None:
    x, weight, bias = torch.randn(1, n_in), torch.randn(n_out, n_in), torch.randn(n_out) if with_bias else None
    assert torch.allclose(kernels.linear(x, weight, bias), functional.linear(x, weight, bias), atol=1e-3)


def test_a_gated_product_of_one_row(kernels: ModuleType) -> None:
    x, weight = torch.randn(1, 600), torch.randn(2 * 37, 600) / 25
    gate, up = functional.linear(x, weight).chunk(2, -1)
    assert torch.allclose(kernels.gate_up_silu(x, weight), functional.silu(gate) * up, atol=1e-4)


@pytest.mark.parametrize(("d", "heads", "key_heads", "rows", "candidates", "lengths", "window"), SHAPES)
def test_attention_in_parts(
    kernels: ModuleType,
    d: int,
    heads: int,
    key_heads: int,
    rows: int,
    candidates: int,
    lengths: list[int],
    window: int,
) -> None:
    torch.manual_seed(0)
    kv = torch.full((2, rows, key_heads, 512, d), math.nan)  # what is not a token's is never read
    for row, length in enumerate(lengths):
        kv[:, row, :, :length] = torch.randn(2, key_heads, length, d)
    n = rows * (candidates or 1)
    q, k, v = torch.randn(n, heads, d), torch.randn(n, key_heads, d), torch.randn(n, key_heads, d)
    angles = torch.randn(rows, 1, d // 2).repeat(1, 1, 2)
    before, layer = kv.clone(), _Layer(d**-0.5, window or None)
    over = kernels.SplitKVAttention([kv], torch.tensor(lengths), angles.cos(), angles.sin(), writes=not candidates)
    seen = over(layer, 0, q, k, v)
    where = angles.repeat_interleave(n // rows, 0)
    q, k = rotary_embedding(q, k, where.cos(), where.sin())
    for row in range(n):
        at = row // (n // rows)
        end = lengths[at]
        assert torch.allclose(seen[row], _seen(before[:, at, :, :end], q[row], k[row], v[row], layer), atol=1e-4)
        if not candidates:
            assert torch.allclose(kv[0, at, :, end], k[row], atol=1e-6)
            assert torch.equal(kv[1, at, :, end], v[row])
            before[:, at, :, end] = kv[:, at, :, end]
    assert torch.equal(kv.nan_to_num(), before.nan_to_num())  # nothing else was written


class _Layer:
    def __init__(self, scale: float, window: int | None) -> None:
        self.scale, self.window = scale, window


def _seen(kv: Tensor, q: Tensor, k: Tensor, v: Tensor, layer: _Layer) -> Tensor:
    """What queries ``[heads, d]`` see of keys and values ``[2, key heads, n, d]`` and of their own token."""
    keys, values = torch.cat([kv, torch.stack([k, v])[:, :, None]], 2)[:, :, -(layer.window or 0) :]
    share = len(q) // len(k)
    keys, values = keys.repeat_interleave(share, 0), values.repeat_interleave(share, 0)
    weights = (torch.einsum("hd,hnd->hn", q, keys) * layer.scale).softmax(-1)
    return torch.einsum("hn,hnd->hd", weights, values).flatten()


@pytest.mark.parametrize(
    ("name", "more"), [("qwen2", {}), ("qwen3", {}), ("mistral", {"sliding_window": 2})], ids=lambda given: str(given)
)
def test_steps_and_selections_are_those_of_the_eager_way(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, more: dict[str, Any]
) -> None:
    monkeypatch.setattr(kernels, "OUTPUTS", 64)  # the interpreter takes a while for every program
    model = tiny_model(name, **more)
    assert runner(model).decoder_batch is not None
    assert graph_builders()[0] is kernels.TritonGraphBuilder
    assert agrees(
        model.model,
        runner(model).decoder_batch,
        GraphRunner(runner(model).decoder_batch, played, builder=kernels.TritonGraphBuilder),
    )


def test_a_kernel_that_cannot_be_made_leaves_the_other_way(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def __getitem__(self, grid: Any) -> Any:
            raise TypeError("no compiler")

    monkeypatch.setattr(kernels.triton_kernels, "merge_splits", Broken())
    model = tiny_model("qwen2")
    assert runner(model).decoder_batch is not None
    graph_runner = GraphRunner(runner(model).decoder_batch, played, builder=kernels.TritonGraphBuilder)
    assert not agrees(model.model, runner(model).decoder_batch, graph_runner)
    assert graph_runner.failed
    assert "TypeError: no compiler" in caplog.text
    assert agrees(
        model.model,
        runner(model).decoder_batch,
        GraphRunner(runner(model).decoder_batch, played),
    )
