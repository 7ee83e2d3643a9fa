"""Generation in bulk: many rows in lockstep, each taking the decisions that ``Engine.steps`` would take for it alone.

Under a grammar, a row's illegal tokens cannot be chosen, and those that it forces are taken without asking anybody.

The engine serves one conversation at a time; rollouts and evaluation need hundreds. A ``Decider`` chooses one token
per row; ``deciders`` holds those that mirror the engine (tests/test_training_lockstep.py holds the two together).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from ..grammar.grammar import Grammar
from ..proposal import entropy_of
from .batch_prefix import BatchPrefix


class View:
    """What a decider sees at one column: B living rows.

    Attributes:
        prefix: the rows' KV, logits and hidden states.
        rows: ``[B]``, each row's place in the batch as it started.
        index: position in the completion, from 0.
    """

    def __init__(self, prefix: BatchPrefix, rows: Tensor, index: int, rules: Sequence[Rules] | None = None) -> None:
        self.prefix, self.rows, self.index = prefix, rows, index
        self._rules = rules
        self._settled = None if rules is None else [each.settled() for each in rules]

    @cached_property
    def logits(self) -> Tensor:
        """``[B, V]``, illegal tokens at -inf."""
        logits = self.prefix.logits
        if self._rules is None or self._settled is None:
            return logits
        legal = torch.ones(logits.shape, dtype=torch.bool)
        for at, (rules, settled) in enumerate(zip(self._rules, self._settled, strict=True)):
            if settled is None:
                rules.allow(legal[at], logits[at])
        return logits.masked_fill(~legal.to(logits.device), -torch.inf)

    @cached_property
    def open(self) -> Tensor:
        """``[B]`` bool: rows with a choice, their next token is not forced."""
        if self._settled is None:
            return torch.ones_like(self.rows, dtype=torch.bool)
        return torch.tensor([token is None for token in self._settled], device=self.rows.device)

    def taken(self, chosen: Tensor) -> Tensor:
        """``[B]``: what was chosen, and where a token is forced, that one."""
        if self._settled is None:
            return chosen
        forced = torch.tensor([-1 if token is None else token for token in self._settled], device=chosen.device)
        return torch.where(self.open.to(chosen.device), chosen, forced)

    @cached_property
    def log_probs(self) -> Tensor:
        """``[B, V]``, over the legal tokens."""
        return torch.log_softmax(self.logits, -1)

    @cached_property
    def entropy(self) -> Tensor:
        """``[B]``, in nats."""
        return entropy_of(self.log_probs)

    @cached_property
    def best(self) -> Tensor:
        """``[B]``: the tokens that the SLM wants most, or has to take."""
        return self.taken(torch.argmax(self.logits, -1))


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


class Rules:
    """One row's grammar, and the tokens that it forces; without a grammar everything is legal."""

    def __init__(self, grammar: Grammar | None) -> None:
        self._grammar = grammar
        self._forced = deque(grammar.forced() if grammar else ())

    @property
    def finished(self) -> bool:
        """Whether nothing more may come."""
        return self._grammar is not None and not self._forced and self._grammar.finished

    def settled(self) -> int | None:
        """The token that must come next; None where there is a choice."""
        return self._forced[0] if self._forced else None

    def allow(self, legal: Tensor, logits: Tensor) -> None:
        """Write what is legal now into ``legal`` ``[V]`` bool, given the model's logits ``[V]``."""
        allowed = self._grammar.allowed(logits) if self._grammar else None
        if allowed is not None:
            legal.copy_(allowed)

    def accept(self, token: int) -> None:
        """The row took this token, not one that ends it."""
        if self._grammar is None:
            return
        self._grammar.accept(token)
        if self._forced:
            self._forced.popleft()
        if not self._forced:
            self._forced.extend(self._grammar.forced())


@torch.inference_mode()
def generate(
    start: BatchPrefix, decider: Decider, max_tokens: int, grammars: Sequence[Grammar | None] | None = None
) -> list[Trace]:
    """Continue every row of ``start`` until its end token, ``max_tokens`` or a full context; ``start`` stays as it is.

    Args:
        start: the prompts.
        decider: chooses.
        max_tokens: for each row.
        grammars: one for each row, just started; None permits every token.

    Returns:
        One trace per row. The end token is the last of ``ids``, as the engine emits it.
    """
    prefix = start.fork()
    model = prefix.model
    room = (model.context_window - prefix.mask.sum(1)).tolist()
    traces = [Trace() for _ in room]
    rules = None if grammars is None else [Rules(grammar) for grammar in grammars]
    alive = list(range(len(room)))
    for index in range(max_tokens):
        living = None if rules is None else [rules[row] for row in alive]
        view = View(prefix, torch.tensor(alive, device=model.device), index, living)
        choice = decider.choose(view)
        going = _record(traces, alive, view, choice, model.eos_ids, room)
        if living is not None:
            going = _accepted(living, choice, going)
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


def _accepted(living: Sequence[Rules], choice: Choice, going: Sequence[int]) -> list[int]:
    """Tell the grammars of the rows that go on what was taken; returns which still go on."""
    tokens = choice.tokens.tolist()
    for at in going:
        living[at].accept(tokens[at])
    return [at for at in going if not living[at].finished]
