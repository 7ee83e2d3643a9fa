"""How each candidate would go on: the SLM's own greedy continuations to the end of the sentence, in one batch.

prefix KV ──cloned K rows──> candidate 1, then greedy ... to the end of its sentence
                             candidate 2, then greedy ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..models.prefix import Prefix

STOPS = (".", "!", "?")
"""A sentence ends with one of these where a blank follows; ``3.14`` goes on."""
FULL_STOPS = ("\n", "\u3002", "\uff01", "\uff1f")
"""It ends with a line, or with a CJK full stop, whatever follows."""
THE_END = "(the answer ends here)"


@dataclass(frozen=True, slots=True)
class Preview:
    """One way to go on.

    Attributes:
        at: places among the candidates of all that read like this, the best first.
        tokens: the first of them and what follows.
        text: as it reads.
    """

    at: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str


def previews(prefix: Prefix, candidates: Sequence[int], limit: int) -> list[Preview]:
    """The candidates' continuations, those that read the same merged, in the order of the candidates.

    Args:
        prefix: stays as it is.
        candidates: ``[K]`` token ids.
        limit: tokens of one preview, the candidate included.
    """
    merged: dict[str, Preview] = {}
    for place, tokens in enumerate(continuations(prefix, candidates, limit)):
        text = spelled(prefix, tokens)
        known = merged.get(text)
        merged[text] = Preview((*known.at, place), known.tokens, text) if known else Preview((place,), tokens, text)
    return list(merged.values())


@torch.inference_mode()
def continuations(prefix: Prefix, candidates: Sequence[int], limit: int) -> list[tuple[int, ...]]:
    """Each candidate and its greedy continuation to the end of the sentence, the answer or ``limit`` tokens."""
    model = prefix.model
    rows = [[token] for token in candidates]
    unfinished = {at for at, row in enumerate(rows) if not _ends(prefix, row)}
    limit = min(limit, model.context_window - len(prefix))
    cache = prefix.branches(len(rows))
    ids = torch.tensor(candidates, device=model.device)[:, None]
    for read in range(1, limit):
        if not unfinished:
            break
        mask = torch.ones(len(rows), len(prefix) + read, dtype=torch.long, device=model.device)
        logits, _ = model.read_rows(ids, mask, cache, 1)
        ids = logits[:, -1].argmax(-1, keepdim=True)
        for at in sorted(unfinished):
            token = int(ids[at])
            if _sentence_over(prefix, rows[at], token):
                unfinished.discard(at)
                continue
            rows[at].append(token)
            if _ends(prefix, rows[at]):
                unfinished.discard(at)
    return [tuple(row) for row in rows]


def spelled(prefix: Prefix, tokens: Sequence[int]) -> str:
    """Tokens as a reader sees them; the end of the answer is said in words."""
    eos = prefix.model.eos_ids
    text = str(prefix.model.tokenizer.decode([token for token in tokens if token not in eos]))
    return text + THE_END if tokens and tokens[-1] in eos else text


def _ends(prefix: Prefix, row: Sequence[int]) -> bool:
    """Nothing may follow: the answer is over, or the line is."""
    return row[-1] in prefix.model.eos_ids or spelled(prefix, row).endswith(FULL_STOPS)


def _sentence_over(prefix: Prefix, row: Sequence[int], following: int) -> bool:
    """The row ends a sentence, and what follows begins another or ends the answer."""
    if not spelled(prefix, row).endswith(STOPS):
        return False
    return following in prefix.model.eos_ids or spelled(prefix, [following])[:1].isspace()
