"""Which rows of tokens go into one forward: those of like length, the turns of one dialogue as one row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

BATCH_TOKENS = 4096
"""Tokens per forward, padding included."""

SPREAD = 1.5
"""Of the lengths in one forward, longest to shortest: beyond, a second forward costs less than the padding."""


def dialogues(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Neighbours of which each goes on where the one before it ended: reading the last of them reads them all.

    A tool-calling answer is such a chain: the prompt of its second turn begins with the first turn's prompt and
    completion.
    """
    chains: list[list[int]] = []
    for at, row in enumerate(rows):
        before = rows[at - 1] if at else []
        if chains and len(before) <= len(row) and row[: len(before)] == before:
            chains[-1].append(at)
        else:
            chains.append([at])
    return chains


def batches_of_dialogues(
    rows: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]] | None = None
) -> Iterator[list[int]]:
    """``batches`` in which the rows of one dialogue stay neighbours and count once.

    Args:
        rows: token ids.
        prompts: with which the rows begin: dialogues that begin with the same one stay together as far as
            ``BATCH_TOKENS`` allows.
    """
    chains = dialogues(rows)
    order: Sequence[int] = range(len(chains))
    if prompts is not None:
        starts = [tuple(prompts[chain[0]]) for chain in chains]
        longest: dict[tuple[int, ...], int] = {}
        for start, chain in zip(starts, chains, strict=True):
            longest[start] = max(longest.get(start, 0), len(rows[chain[-1]]))
        order = sorted(order, key=lambda at: (longest[starts[at]], starts[at]))
    lengths = [len(rows[chains[at][-1]]) if prompts is None else longest[starts[at]] for at in order]
    for batch in batches(lengths):
        yield [at for place in batch for at in chains[order[place]]]


def batches(lengths: Sequence[int], tokens: float = BATCH_TOKENS) -> Iterator[list[int]]:
    """Places of rows that go into one forward: the longest at most ``SPREAD`` times the shortest, and at most
    ``tokens`` with padding."""
    order = sorted(range(len(lengths)), key=lambda at: lengths[at])
    batch: list[int] = []
    for at in order:
        if batch and ((len(batch) + 1) * lengths[at] > tokens or lengths[at] > SPREAD * lengths[batch[0]]):
            yield batch
            batch = []
        batch.append(at)
    if batch:
        yield batch
