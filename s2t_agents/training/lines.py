"""A second model's view of a batch, caught up lazily, and what asking it costs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .batch_prefix import BatchPrefix
from .lockstep import View


class Line:
    """KV of another model (or of the same with an adapter on) over the same rows; read only when it is asked.

    Args:
        start: makes the prefix over the prompts; called at the first question.
        on: entered around every forward, for an adapter.
    """

    def __init__(
        self, start: Callable[[], BatchPrefix], on: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self._start, self._on = start, on
        self._prefix: BatchPrefix | None = None
        self._pending: list[Tensor] = []  # columns [B] seen and not read yet
        self._kept: Tensor | None = None  # rows still alive, while there is no prefix to drop the others from

    def saw(self, tokens: Tensor) -> None:
        """The batch took these tokens ``[B]``."""
        self._pending.append(tokens)

    def keep(self, rows: Tensor) -> None:
        """Only these rows go on."""
        self._pending = [column[rows] for column in self._pending]
        if self._prefix is not None:
            self._prefix.keep(rows)
        else:
            self._kept = rows if self._kept is None else self._kept[rows]

    def prefix(self) -> BatchPrefix:
        """The rows as they stand now, everything pending read in one forward."""
        with self._on():
            if self._prefix is None:
                self._prefix = self._start()
                if self._kept is not None:
                    self._prefix.keep(self._kept)
            if self._pending:
                self._prefix.extend(torch.stack(self._pending, dim=1).to(self._prefix.model.device))
                self._pending = []
        return self._prefix

    def log_probs(self, rows: Tensor) -> Tensor:
        """``[N, V]`` after the present prefix of ``rows`` ``[N]``."""
        logits = self.prefix().logits
        return torch.log_softmax(logits[rows.to(logits.device)], -1).to(rows.device)


class LLMCallCounter:
    """LLM calls and tokens per item, charged as ``LocalLLM`` charges: what its KV does not hold yet, plus one.

    Args:
        items: how many items; turns of one item share its count.
    """

    def __init__(self, items: int) -> None:
        self.calls = torch.zeros(items, dtype=torch.long)
        self.tokens = torch.zeros(items, dtype=torch.long)
        self._read: dict[int, list[int]] = {}
        self._of_row: Tensor = torch.arange(items)
        self._prompts: list[list[int]] = []
        self._known: list[int] = []

    def turn(self, prompts: list[list[int]], items: list[int]) -> None:
        """A batch begins: row i continues item ``items[i]`` with ``prompts[i]``."""
        self._of_row, self._prompts = torch.tensor(items), prompts
        self._known = [_shared(self._read.get(item, []), prompt) for item, prompt in zip(items, prompts, strict=True)]

    def used(self, view: View, rows: Tensor) -> Tensor:
        """``[N]``: calls made so far by the items of these living rows."""
        return self.calls[self._of_row[view.rows[rows].cpu()]].to(rows.device)

    def count(self, view: View, rows: Tensor) -> None:
        """One call for each of these living rows."""
        for row in view.rows[rows].tolist():
            item = int(self._of_row[row])
            length = len(self._prompts[row]) + view.index
            self.calls[item] += 1
            self.tokens[item] += length - self._known[row] + 1
            self._known[row] = length
            self._read[item] = self._prompts[row]  # what a later turn can share: its prompt begins with this one's


def _shared(ours: list[int], theirs: list[int]) -> int:
    """Leading tokens in common, less than all of ``theirs``."""
    same = 0
    for a, b in zip(ours, theirs[:-1], strict=False):
        if a != b:
            break
        same += 1
    return same
