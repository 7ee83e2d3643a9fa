"""Attention on CUDA takes no kernel that plans for every new length; whatever was set is set again afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from s2t_agents.backends.torch.sdpa_backend import without_cudnn_attention

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(params=[True, False])
def before(request: pytest.FixtureRequest) -> Iterator[bool]:
    was = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(request.param)
    yield request.param
    torch.backends.cuda.enable_cudnn_sdp(was)


def test_inside_the_block_it_is_off_and_afterwards_as_before(before: bool) -> None:
    with without_cudnn_attention(CUDA):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        with without_cudnn_attention(CUDA):
            assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_after_an_error_it_is_as_before(before: bool) -> None:
    with pytest.raises(ValueError, match="forward"), without_cudnn_attention(CUDA):
        raise ValueError("forward")
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_elsewhere_nothing_is_set(before: bool) -> None:
    with without_cudnn_attention(CPU):
        assert torch.backends.cuda.cudnn_sdp_enabled() == before
