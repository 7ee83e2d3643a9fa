"""Many prompts and what follows them, read in few forwards: for labels, not for answers.

Rows are padded on the left, so that every row ends in the same column:

    row 0   . . . a b c d | . e f     row 1   a b c d e f g | h i j     (| the prompts' end, common to all)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ..backends.torch.candidate_overlay import rows_of
from ..errors import ConfigError
from ..scheduling.language_model import LanguageModel


@torch.inference_mode()
def logits_along(
    model: LanguageModel, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> Tensor:
    """Logits ``[B, 1 + T, V]`` at each prompt's end and after each token of its completion of up to T tokens.

    Two forwards: one for the distinct prompts, one for the completions. A completion ends in the last column; a
    shorter one has padding between its prompt's end (column 0) and its first token.

    Args:
        model: attention-only (plain or sliding), in torch.
        prompts: B, of at least one token.
        completions: B, of any length.

    Raises:
        ConfigError: a model with recurrent layers, which padding would disturb.
    """
    if not model.capabilities.truncation:
        raise ConfigError(
            f"{model.name!r} has recurrent layers and cannot read padded batches.",
            hint="Use a model whose layers are all attention.",
        )
    places = {row: at for at, row in enumerate(dict.fromkeys(map(tuple, prompts)))}
    ids, mask = left_padded(list(places), model.device)
    cache = DynamicCache()
    ends, _ = model.torch_backend.read_rows(ids, mask, cache, 1)
    rows = torch.tensor([places[tuple(prompt)] for prompt in prompts], device=model.device)
    if not any(completions):
        return ends[rows]
    ids, after = left_padded(completions, model.device)
    seen = torch.cat([mask[rows], after], 1)
    logits, _ = model.torch_backend.read_rows(ids, seen, rows_of(cache, rows), ids.shape[1])
    return torch.cat([ends[rows], logits], 1)


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask, both ``[B, T]``: rows of different length, right-aligned."""
    width = max(map(len, rows))
    ids = [[0] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
