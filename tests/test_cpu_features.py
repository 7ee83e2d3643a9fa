"""What the CPU multiplies at full speed: whatever it is, the two questions agree."""

import pytest
import torch

from s2t_agents.backends.torch.cpu_features import lays_out, widens


def test_a_dtype_that_is_laid_out_is_not_widened() -> None:
    assert not (lays_out(torch.bfloat16) and widens(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int8])
def test_only_half_precision_can_be_widened(dtype: torch.dtype) -> None:
    assert not widens(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8])
def test_other_dtypes_are_never_laid_out(dtype: torch.dtype) -> None:
    assert not lays_out(dtype)


def test_nothing_is_laid_out_while_onednn_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not lays_out(torch.float32)


def test_a_torch_without_onednn_knows_of_no_widening(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert not lays_out(torch.float32)
    assert not widens(torch.bfloat16)
