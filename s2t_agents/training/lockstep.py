"""Generation in bulk: many rows in lockstep, each taking the decisions that ``Engine.steps`` would take for it alone.

The engine serves one conversation at a time; rollouts and evaluation need hundreds. A ``Decider`` chooses one token
per row; ``deciders`` holds those that mirror the engine (tests/test_training_lockstep.py holds the two together).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from ..models.batch_prefix import BatchPrefix
from ..proposal import entropy_of


class View:
    """What a decider sees at one column: B living rows.

    Attributes:
        prefix: the rows' KV, logits and hidden states.
        rows: ``[B]``, each row's place in the batch as it started.
        index: position in the completion, from 0.
    """

    def __init__(self, prefix: BatchPrefix, rows: Tensor, index: int) -> None:
        self.prefix, self.rows, self.index = prefix, rows, index

    @cached_property
    def log_probs(self) -> Tensor:
        """``[B, V]``."""
        return torch.log_softmax(self.prefix.logits, -1)

    @cached_property
    def entropy(self) -> Tensor:
        """``[B]``, in nats."""
        return entropy_of(self.log_probs)

    @cached_property
    def best(self) -> Tensor:
        """``[B]``: the tokens that the SLM wants most."""
        return torch.argmax(self.prefix.logits, -1)


@dataclass(frozen=True)
class Choice:
    """One column decided, ``[B]`` each: the tokens, which steps were critical, which of them the LLM decided."""

    tokens: Tensor
    triggered: Tensor
    by_llm: Tensor


class Decider(Protocol):
    """Chooses the next token of every living row."""

    def choose(self, view: View) -> Choice:
        """The next column."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Only these of the living rows go on."""
        ...


@dataclass
class Trace:
    """One completion: its tokens, and where it was triggered, flipped or decided by the LLM (positions in ``ids``)."""

    ids: list[int] = field(default_factory=list)
    triggered: list[int] = field(default_factory=list)
    flipped: list[int] = field(default_factory=list)
    by_llm: list[int] = field(default_factory=list)


@torch.inference_mode()
def generate(start: BatchPrefix, decider: Decider, max_tokens: int) -> list[Trace]:
    """Continue every row of ``start`` until its end token, ``max_tokens`` or a full context; ``start`` stays as it is.

    Returns:
        One trace per row. The end token is the last of ``ids``, as the engine emits it.
    """
    prefix = start.fork()
    model = prefix.model
    room = (model.context_window - prefix.mask.sum(1)).tolist()
    traces = [Trace() for _ in room]
    alive = list(range(len(room)))
    for index in range(max_tokens):
        view = View(prefix, torch.tensor(alive, device=model.device), index)
        choice = decider.choose(view)
        going = _record(traces, alive, view, choice, model.eos_ids, room)
        if not going:
            break
        if len(going) < len(alive):
            rows = torch.tensor(going, device=model.device)
            prefix.keep(rows)
            decider.keep(rows)
            alive = [alive[at] for at in going]
        if index + 1 < max_tokens:
            prefix.extend(choice.tokens[torch.tensor(going, device=model.device)][:, None])
    return traces


def _record(
    traces: list[Trace],
    alive: Sequence[int],
    view: View,
    choice: Choice,
    eos_ids: frozenset[int],
    room: Sequence[int],
) -> list[int]:
    """Write one column into the traces; returns which of the living rows go on."""
    going = []
    columns = zip(
        alive,
        choice.tokens.tolist(),
        view.best.tolist(),
        choice.triggered.tolist(),
        choice.by_llm.tolist(),
        strict=True,
    )
    for at, (row, token, wanted, triggered, by_llm) in enumerate(columns):
        trace = traces[row]
        position = len(trace.ids)
        trace.ids.append(token)
        if triggered:
            trace.triggered.append(position)
            if token != wanted:
                trace.flipped.append(position)
        if by_llm:
            trace.by_llm.append(position)
        if token not in eos_ids and len(trace.ids) < room[row]:
            going.append(at)
    return going
