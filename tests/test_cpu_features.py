"""What the CPU multiplies at full speed: whatever it is, the two questions agree."""

import pytest
import torch

from s2t_agents.backends.torch.cpu_features import is_emulated, supports_packed_weights


def test_a_dtype_that_is_laid_out_is_not_widened() -> None:
    assert not (supports_packed_weights(torch.bfloat16) and is_emulated(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int8])
def test_only_half_precision_can_be_widened(dtype: torch.dtype) -> None:
    assert not is_emulated(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8])
def test_other_dtypes_are_never_laid_out(dtype: torch.dtype) -> None:
    assert not supports_packed_weights(dtype)


def test_nothing_is_laid_out_while_onednn_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not supports_packed_weights(torch.float32)


def test_a_torch_without_onednn_knows_of_no_widening(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert not supports_packed_weights(torch.float32)
    assert not is_emulated(torch.bfloat16)
