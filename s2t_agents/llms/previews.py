"""Previews of candidates: the SLM's greedy continuation of each to the end of its sentence, decoded in one batch.

KV cache ──forked K times──> candidate 1, then greedy ... to the end of its sentence
                             candidate 2, then greedy ...

If the call has a grammar, each token is the most likely legal one, as in the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..grammar.grammar import Grammar
from ..scheduling.sequence import TokenSequence
from ..scheduling.waits import finish
from .continuation import GreedyContinuation, decode_without_eos

END_MARK = "(the answer ends here)"


@dataclass(frozen=True, slots=True)
class Preview:
    """The continuation of one candidate, or of several with the same text.

    Attributes:
        at: indices of the candidates with this text, best first.
        tokens: token ids of the first of these candidates and its continuation.
        text: as shown to the judge.
    """

    at: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str


def previews(
    prefix: TokenSequence, candidates: Sequence[int], limit: int, grammar: Grammar | None = None
) -> list[Preview]:
    """The candidates' continuations in order, those with the same text merged.

    Args:
        prefix: not modified.
        candidates: ``[K]`` token ids.
        limit: tokens of one preview, the candidate included.
        grammar: the state after the prefix, not modified; None permits all.
    """
    merged: dict[str, Preview] = {}
    for place, tokens in enumerate(continuations(prefix, candidates, limit, grammar)):
        text = preview_text(prefix, tokens)
        known = merged.get(text)
        merged[text] = Preview((*known.at, place), known.tokens, text) if known else Preview((place,), tokens, text)
    return list(merged.values())


@torch.inference_mode()
def continuations(
    prefix: TokenSequence, candidates: Sequence[int], limit: int, grammar: Grammar | None = None
) -> list[tuple[int, ...]]:
    """Each candidate and its greedy continuation to the end of the sentence, the answer or ``limit`` tokens."""
    branches = [GreedyContinuation(prefix, token, grammar) for token in candidates]
    limit = min(limit, prefix.model.context_window - len(prefix))
    with prefix.forks(len(branches)) as forks:
        for _ in range(1, limit):
            if all(branch.finished for branch in branches):
                break
            rows = finish(forks.appending([None if each.finished else each.tokens[-1] for each in branches]))
            for branch, logits in zip(branches, rows, strict=True):
                if logits is not None:
                    branch.advance(logits)
    return [tuple(branch.tokens) for branch in branches]


def preview_text(prefix: TokenSequence, tokens: Sequence[int]) -> str:
    """Tokens as text; the end of the answer is marked in words."""
    text = decode_without_eos(prefix, tokens)
    return text + END_MARK if tokens and tokens[-1] in prefix.model.eos_ids else text
