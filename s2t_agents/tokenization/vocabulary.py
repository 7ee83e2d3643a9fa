"""A tokenizer and an output layer that differ in size: what has no embedding is never fed, what has no text never said.

ids        0 ........................ tokens - 1
rows       0 ................. rows - 1                   Llama-2 with a [PAD], Gemma 3 with its image token
rows       0 ................................. rows - 1   Qwen's padding to a multiple of 128
"""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..errors import TokenizerMismatch


def fitted(tokenizer: Any, rows: int, name: str) -> Any:
    """The tokenizer, without the added tokens that the model has no embedding for: their text is ordinary text.

    Args:
        tokenizer: a fast Hugging Face tokenizer; left as it is.
        rows: of the embedding.
        name: of the model, for the error.

    Returns:
        The tokenizer itself where every id has a row, or a copy.

    Raises:
        TokenizerMismatch: ordinary tokens lie outside: it belongs to another model.
    """
    outside = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows}
    if not outside or not getattr(tokenizer, "is_fast", False):
        return tokenizer
    added = {i for i, _ in tokenizer.backend_tokenizer.get_added_tokens_decoder().items()}
    if ordinary := sorted((i, token) for token, i in outside.items() if i not in added):
        raise TokenizerMismatch(
            f"the tokenizer of {name!r} has {len(ordinary)} ordinary tokens outside the model's {rows} embeddings, "
            f"{ordinary[0][1]!r} (id {ordinary[0][0]}) first.",
            hint="It belongs to another model: take the tokenizer that these weights were trained with.",
        )
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described["added_tokens"] = [each for each in described["added_tokens"] if each["id"] < rows]
    vocabulary = described["model"]["vocab"]
    if isinstance(vocabulary, dict):
        kept = {token: i for token, i in vocabulary.items() if i < rows}
        described["model"]["vocab"] = kept | {each["content"]: each["id"] for each in described["added_tokens"]}
    else:
        described["model"]["vocab"] = vocabulary[:rows]
    return _with_backend(tokenizer, described)


def filled(tokenizer: Any) -> Any:
    """The tokenizer with a control token at every id that has none, for readers that count on all being there.

    Args:
        tokenizer: a fast Hugging Face tokenizer; left as it is.

    Returns:
        The tokenizer itself where its ids have no holes, or a copy.
    """
    known = set(tokenizer.get_vocab().values())
    holes = [i for i in range(max(known)) if i not in known]
    described = json.loads(tokenizer.backend_tokenizer.to_str()) if holes else {}
    if not holes or not isinstance(described["model"]["vocab"], dict):
        return tokenizer
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    described["added_tokens"] += [{"id": i, "content": f"\ue005{i}\ue006", **flags} for i in holes]
    described["added_tokens"].sort(key=lambda each: each["id"])
    described["model"]["vocab"] |= {each["content"]: each["id"] for each in described["added_tokens"]}
    return _with_backend(tokenizer, described)


def _with_backend(tokenizer: Any, described: dict[str, Any]) -> Any:
    """A copy of the tokenizer with another backend, as JSON; transformers has no public way to set one."""
    other = copy.copy(tokenizer)
    other._tokenizer = Tokenizer.from_str(json.dumps(described))
    return other


def with_text(tokenizer: Any, size: int) -> Tensor | None:
    """``[size]`` bool: logits that a token of the tokenizer belongs to; None when all have one."""
    known = torch.zeros(size, dtype=torch.bool)
    known[torch.tensor([i for i in tokenizer.get_vocab().values() if i < size], dtype=torch.long)] = True
    return None if bool(known.all()) else known
