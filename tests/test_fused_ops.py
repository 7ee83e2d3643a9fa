"""What stands between a model's products: fused by torch's compiler it says the same, and it does without one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from s2t_agents.backends.torch import fused_ops as pointwise
from s2t_agents.backends.torch.fused_ops import EAGER, CompiledOp, compiled_ops

HEADS, KEY_HEADS, D, CAPACITY, H = 4, 2, 8, 512, 32


def inputs(rows: int, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """For every function, arguments of the shapes that a step of so many rows gives it."""
    torch.manual_seed(rows)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    group, logits = HEADS // KEY_HEADS, torch.randn(rows, 300).index_fill(1, torch.tensor([3, 9]), -torch.inf)
    mask = torch.zeros(1, 1, 1, CAPACITY, dtype=dtype).masked_fill(torch.arange(CAPACITY) >= 40, -torch.inf)
    best = logits.argmax(-1, keepdim=True)
    keys = [torch.zeros(rows, KEY_HEADS, CAPACITY, D, dtype=dtype) for _ in range(2)]
    beside = (some(rows, KEY_HEADS, group, D), some(rows, KEY_HEADS, 1, D))
    return {
        "add_rms_norm": (some(rows, H), some(rows, H), some(H), 1e-6),
        "rotary_embedding": (some(rows, HEADS, D), some(rows, KEY_HEADS, D), some(rows, 1, D), some(rows, 1, D)),
        "silu_and_mul": (some(rows, H), some(rows, H)),
        "write_kv": (*keys, torch.arange(rows), torch.arange(rows) + 7, *(some(rows, KEY_HEADS, D) for _ in range(2))),
        "attention_weights": (some(rows, KEY_HEADS, group, CAPACITY), mask, 0.3),
        "candidate_weights": (some(1, KEY_HEADS, rows * group, CAPACITY), mask, *beside, 0.3),
        "candidate_outputs": (some(1, KEY_HEADS, 3, rows * group, D), some(1, KEY_HEADS, rows * group, 1), beside[1]),
        "sum_splits": (some(rows, KEY_HEADS, 3, group, D),),
        "logit_statistics": (logits, best, logits.gather(-1, best)),
    }


def outcome(function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Tensor]:
    """What a function gives, and what it has written to."""
    own = [each.clone() if isinstance(each, Tensor) else each for each in arguments]
    with torch.inference_mode():
        said = function(*own)
    given = said if isinstance(said, tuple) else (said,)
    return [each for each in (*given, *own) if isinstance(each, Tensor)]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "sizes"), [(torch.float32, (1, 2, 5)), (torch.bfloat16, (5,))])
def test_compiled_they_say_what_they_say_plainly_for_all_sizes(
    dtype: torch.dtype, sizes: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    for rows in sizes:
        arguments = inputs(rows, dtype)
        assert set(arguments) == set(vars(EAGER))
        for name, each in arguments.items():
            plain, compiled = (outcome(getattr(ops, name), each) for ops in (EAGER, compiled_ops()))
            for one, other in zip(plain, compiled, strict=True):
                tolerance = 1e-5 if dtype == torch.float32 else 5e-2
                assert torch.allclose(one.double(), other.double(), atol=tolerance), name
    assert [each.message for each in caplog.records if each.name == pointwise.__name__] == []  # all were compiled


def test_the_last_row_of_a_mask_is_seen_by_nobody() -> None:
    scores, mask = torch.randn(1, 2, 3, 8), torch.tensor([0.0] * 5 + [-torch.inf] * 3)
    weights = pointwise.attention_weights(scores, mask, 0.5)
    assert torch.equal(weights[..., 5:], torch.zeros(1, 2, 3, 3))
    assert torch.allclose(weights.sum(-1), torch.ones(1, 2, 3))


def test_without_a_compiler_the_function_itself_runs_and_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(function: Any, **_: Any) -> Any:
        def run(*_: Any) -> Any:
            raise RuntimeError("no C compiler\nand a long story")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    kernel = CompiledOp(pointwise.silu_and_mul)
    gate, up = torch.randn(2, 3, 8)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(kernel(gate, up), pointwise.silu_and_mul(gate, up))
    assert [each.message for each in caplog.records] == [
        "silu_and_mul goes on without being compiled: RuntimeError: no C compiler"
    ]


def test_wrong_inputs_fail_as_they_do_plainly() -> None:
    kernel = CompiledOp(pointwise.silu_and_mul)
    with pytest.raises(RuntimeError, match="size of tensor"):
        kernel(torch.zeros(1, 3), torch.zeros(1, 4))
