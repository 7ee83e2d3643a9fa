"""Short hashes that tell whether two tokenizers, or two sets of weights, are the same thing."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

PROBES = 4096
"""How many values of the input embedding the weights' fingerprint reads."""


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of what ids mean: the vocabulary and the added tokens. Template and settings do not count."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return _short(json.dumps(vocabulary, ensure_ascii=True))


def shared_ids(ours: Any, theirs: Any) -> list[str]:
    """Tokens of ``ours`` whose id means something else, or nothing, in ``theirs``; empty when ours fits in theirs."""
    other = theirs.get_vocab()
    return [token for token, token_id in ours.get_vocab().items() if other.get(token) != token_id]


def weights_fingerprint(model: nn.Module) -> str:
    """Hash of evenly spaced values of the input embedding, rounded to bf16 so that the loading dtype does not count."""
    embedding = model.get_input_embeddings().weight.detach().flatten()  # type: ignore[operator]
    at = torch.linspace(0, embedding.numel() - 1, min(PROBES, embedding.numel()), dtype=torch.float64).long()
    probes = embedding[at.to(embedding.device)].to("cpu", torch.bfloat16)
    return _short(str(tuple(embedding.shape)) + str(probes.view(torch.int16).tolist()))


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
