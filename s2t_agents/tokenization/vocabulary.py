"""Tokenizers whose vocabulary differs in size from the model's embedding or output layer.

Added tokens without an embedding row are removed; logits without a token are masked.

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


def drop_tokens_without_embedding(tokenizer: Any, rows: int, name: str) -> Any:
    """The tokenizer without added tokens that have no embedding row; their text is encoded as ordinary text.

    Args:
        tokenizer: a fast Hugging Face tokenizer; not modified.
        rows: number of embedding rows.
        name: of the model, for the error.

    Returns:
        The tokenizer itself if every id has a row; else a copy.

    Raises:
        TokenizerMismatch: ordinary tokens have no row: the tokenizer belongs to another model.
    """
    without_row = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows}
    if not without_row or not getattr(tokenizer, "is_fast", False):
        return tokenizer
    added = {i for i, _ in tokenizer.backend_tokenizer.get_added_tokens_decoder().items()}
    if ordinary := sorted((i, token) for token, i in without_row.items() if i not in added):
        raise TokenizerMismatch(
            f"the tokenizer of {name!r} has {len(ordinary)} ordinary tokens outside the model's {rows} embeddings, "
            f"{ordinary[0][1]!r} (id {ordinary[0][0]}) first.",
            hint="It belongs to another model: take the tokenizer that these weights were trained with.",
        )
    serialized = json.loads(tokenizer.backend_tokenizer.to_str())
    serialized["added_tokens"] = [each for each in serialized["added_tokens"] if each["id"] < rows]
    vocabulary = serialized["model"]["vocab"]
    if isinstance(vocabulary, dict):
        kept_vocab = {token: i for token, i in vocabulary.items() if i < rows}
        serialized["model"]["vocab"] = kept_vocab | {each["content"]: each["id"] for each in serialized["added_tokens"]}
    else:
        serialized["model"]["vocab"] = vocabulary[:rows]
    return _copy_with_backend(tokenizer, serialized)


def fill_unused_ids(tokenizer: Any) -> Any:
    """The tokenizer with a placeholder control token at every unused id, for libraries that need contiguous ids.

    Args:
        tokenizer: a fast Hugging Face tokenizer; not modified.

    Returns:
        The tokenizer itself if its ids are contiguous; else a copy.
    """
    known = set(tokenizer.get_vocab().values())
    holes = [i for i in range(max(known)) if i not in known]
    serialized = json.loads(tokenizer.backend_tokenizer.to_str()) if holes else {}
    if not holes or not isinstance(serialized["model"]["vocab"], dict):
        return tokenizer
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    serialized["added_tokens"] += [{"id": i, "content": f"\ue005{i}\ue006", **flags} for i in holes]
    serialized["added_tokens"].sort(key=lambda each: each["id"])
    serialized["model"]["vocab"] |= {each["content"]: each["id"] for each in serialized["added_tokens"]}
    return _copy_with_backend(tokenizer, serialized)


def _copy_with_backend(tokenizer: Any, serialized: dict[str, Any]) -> Any:
    """A copy of the tokenizer with another backend, given as JSON; transformers has no public way to set it."""
    other = copy.copy(tokenizer)
    other._tokenizer = Tokenizer.from_str(json.dumps(serialized))
    return other


def decodable_ids(tokenizer: Any, size: int) -> Tensor | None:
    """``[size]`` bool: ids that are tokens of the tokenizer; None if all are."""
    known = torch.zeros(size, dtype=torch.bool)
    known[torch.tensor([i for i in tokenizer.get_vocab().values() if i < size], dtype=torch.long)] = True
    return None if bool(known.all()) else known
