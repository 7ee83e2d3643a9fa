"""How each candidate would go on: the SLM's own greedy continuations to the end of the sentence, in one batch.

prefix KV ──cloned K rows──> candidate 1, then greedy ... to the end of its sentence
                             candidate 2, then greedy ...

Under the call's grammar where there is one: each token is the likeliest legal one, as the engine itself would take it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..scheduling.sequence import Prefix
from .constraint import Constraint
from .continuation import Branch, plain

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


def previews(prefix: Prefix, candidates: Sequence[int], limit: int, grammar: Constraint | None = None) -> list[Preview]:
    """The candidates' continuations, those that read the same merged, in the order of the candidates.

    Args:
        prefix: stays as it is.
        candidates: ``[K]`` token ids.
        limit: tokens of one preview, the candidate included.
        grammar: its state after the prefix, left as it is; None permits all.
    """
    merged: dict[str, Preview] = {}
    for place, tokens in enumerate(continuations(prefix, candidates, limit, grammar)):
        text = spelled(prefix, tokens)
        known = merged.get(text)
        merged[text] = Preview((*known.at, place), known.tokens, text) if known else Preview((place,), tokens, text)
    return list(merged.values())


@torch.inference_mode()
def continuations(
    prefix: Prefix, candidates: Sequence[int], limit: int, grammar: Constraint | None = None
) -> list[tuple[int, ...]]:
    """Each candidate and its greedy continuation to the end of the sentence, the answer or ``limit`` tokens."""
    branches = [Branch(prefix, token, grammar) for token in candidates]
    limit = min(limit, prefix.model.context_window - len(prefix))
    with prefix.branches(len(branches)) as copies:
        for _ in range(1, limit):
            if all(branch.over for branch in branches):
                break
            logits = copies.extend(torch.tensor([branch.tokens[-1] for branch in branches]))
            for branch, row in zip(branches, logits, strict=True):
                if not branch.over:
                    branch.follow(row)
    return [tuple(branch.tokens) for branch in branches]


def spelled(prefix: Prefix, tokens: Sequence[int]) -> str:
    """Tokens as a reader sees them; the end of the answer is said in words."""
    text = plain(prefix, tokens)
    return text + THE_END if tokens and tokens[-1] in prefix.model.eos_ids else text
