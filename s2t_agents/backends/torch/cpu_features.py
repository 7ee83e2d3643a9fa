"""What this machine's CPU multiplies at full speed.

Half precision is quick only where the processor has instructions for it (AVX-512 or AMX on x86). Elsewhere, as on most
laptops, torch widens every number on its way: a single token is still quick, since half the bytes are read, but prompts
take several times as long as in fp32, and eight rows cost eight times one.
"""

from __future__ import annotations

import torch


def supports_packed_weights(dtype: torch.dtype) -> bool:
    """Whether oneDNN, as torch was built here, takes weights of this dtype in its own layout at full speed."""
    needed = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    if not torch.backends.mkldnn.enabled or not all(hasattr(torch.ops.mkldnn, name) for name in needed):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def is_emulated(dtype: torch.dtype) -> bool:
    """Whether the CPU is known to have no instructions for a half-precision dtype, so that torch computes in fp32."""
    known = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    asked = known.get(dtype)
    supported = getattr(torch.ops.mkldnn, asked, None) if asked is not None else None
    return supported is not None and not supported()
