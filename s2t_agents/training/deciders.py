"""How a column of tokens is decided: greedily, by drawing, or with a second look at critical steps.

``Corrected`` is the engine's loop body for many rows; what it does at critical rows is a ``Picker``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..proposal import best_first
from .lines import Line, LLMCallCounter
from .lockstep import Choice, View
from .scorers import Scorer

Condition = Callable[[View], Tensor]
"""A trigger for many rows: from a view to ``[B]`` bool."""


def entropy_above(nats: float) -> Condition:
    """``triggers.entropy`` for many rows."""
    return lambda view: torch.ge(view.entropy, nats)


def probe_above(weight: Tensor, bias: float, threshold: float) -> Condition:
    """``triggers.probe`` for many rows."""

    def condition(view: View) -> Tensor:
        hidden = view.prefix.hidden.float()
        at = weight.to(hidden.device)
        scores = hidden @ at[:-1] + view.entropy * at[-1] + bias
        return scores.sigmoid() >= threshold

    return condition


def at_random(rate: float, seeds: Sequence[int], max_tokens: int) -> Condition:
    """A share of steps chosen by lot, the same for a row whatever else is in the batch."""
    lots = uniforms(seeds, max_tokens)
    return lambda view: lots[view.rows.cpu(), view.index].to(view.rows.device) < rate


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """``[len(seeds), count]`` numbers in [0, 1), each row from its own seed."""
    rows = [torch.rand(count, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


class Greedy:
    """The SLM's own best token."""

    def choose(self, view: View) -> Choice:
        """The next column."""
        nobody = torch.zeros_like(view.best, dtype=torch.bool)
        return Choice(view.best, nobody, nobody)

    def keep(self, rows: Tensor) -> None:
        """Nothing to remember."""


class Sampled(Greedy):
    """A draw from the SLM's distribution at a temperature, each row from its own seed; greedy where that is None."""

    def __init__(self, temperature: float, seeds: Sequence[int | None], max_tokens: int) -> None:
        self._temperature = temperature
        self._greedy = torch.tensor([seed is None for seed in seeds])
        self._lots = uniforms([seed or 0 for seed in seeds], max_tokens)

    def choose(self, view: View) -> Choice:
        """The next column, by inverse of the cumulative distribution."""
        mass = (view.logits / self._temperature).softmax(-1).double().cumsum(-1)
        lots = self._lots[view.rows.cpu(), view.index].to(mass.device).double()[:, None] * mass[:, -1:]
        drawn = torch.searchsorted(mass, lots, right=True)[:, 0].clamp_max(mass.shape[1] - 1)
        greedy = self._greedy[view.rows.cpu()].to(drawn.device)
        tokens = torch.where(greedy, view.best, view.taken(drawn))
        nobody = torch.zeros_like(tokens, dtype=torch.bool)
        return Choice(tokens, nobody, nobody)


class Picker(Protocol):
    """Decides critical rows."""

    @property
    def lines(self) -> Sequence[Line]:
        """KV of other models that the picker reads; kept in step with the batch."""
        ...

    def pick(self, view: View, rows: Tensor, candidates: Tensor, slm: Tensor) -> tuple[Tensor, Tensor]:
        """Choose for ``rows`` ``[N]`` among ``candidates`` ``[N, K]`` with SLM log-probabilities ``slm`` ``[N, K]``.

        Returns:
            Tokens ``[N]``, and ``[N]`` bool: the LLM decided.
        """
        ...


class Corrected:
    """Greedy, but a picker decides critical steps."""

    def __init__(self, condition: Condition, picker: Picker, k: int) -> None:
        self._condition, self._picker, self._k = condition, picker, k

    def choose(self, view: View) -> Choice:
        """The next column."""
        triggered = self._condition(view) & view.open
        tokens, by_llm = view.best.clone(), torch.zeros_like(triggered)
        rows = triggered.nonzero()[:, 0]
        if len(rows):
            slm, candidates = best_first(view.log_probs[rows], self._k, view.best[rows])
            tokens[rows], by_llm[rows] = self._picker.pick(view, rows, candidates, slm)
        for line in self._picker.lines:
            line.saw(tokens)
        return Choice(tokens, triggered, by_llm)

    def keep(self, rows: Tensor) -> None:
        """Tell the lines which rows go on."""
        for line in self._picker.lines:
            line.keep(rows)


class Local:
    """A local selector decides."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self.lines = scorer.lines

    def pick(self, view: View, rows: Tensor, candidates: Tensor, slm: Tensor) -> tuple[Tensor, Tensor]:
        """The candidate with the highest score."""
        best = self._scorer.scores(view, rows, candidates, slm).argmax(-1, keepdim=True)
        return candidates.gather(1, best)[:, 0], torch.zeros_like(rows, dtype=torch.bool)


class LLMSelection:
    """The LLM decides among the candidates."""

    def __init__(self, line: Line, meter: LLMCallCounter) -> None:
        self._line, self._meter = line, meter
        self.lines = [line]

    def pick(self, view: View, rows: Tensor, candidates: Tensor, slm: Tensor) -> tuple[Tensor, Tensor]:
        """The candidate that the LLM holds most likely; it is not asked about one alone."""
        asked = several(slm)
        self._meter.count(view, rows[asked])
        best = torch.zeros_like(rows)
        if asked.any():
            best[asked] = among_legal(self._line.log_probs(rows[asked]), candidates[asked], slm[asked])
        return candidates.gather(1, best[:, None])[:, 0], asked


class Takeover:
    """The LLM writes the token itself, among all of the vocabulary."""

    def __init__(self, line: Line, meter: LLMCallCounter) -> None:
        self._line, self._meter = line, meter
        self.lines = [line]

    def pick(self, view: View, rows: Tensor, candidates: Tensor, slm: Tensor) -> tuple[Tensor, Tensor]:
        """The LLM's best token."""
        self._meter.count(view, rows)
        legal = view.logits[rows] > -torch.inf
        return self._line.log_probs(rows).masked_fill(~legal, -torch.inf).argmax(-1), torch.ones_like(legal[:, 0])


class Hybrid:
    """A local selector decides; the LLM where its margin is small and the answer's escalations are not used up.

    Args:
        scorer: the local selector.
        line: the LLM.
        meter: counts what each answer has used.
        margin: of the selector's confidence, under which the LLM is asked.
        limit: escalations per answer.
    """

    def __init__(self, scorer: Scorer, line: Line, meter: LLMCallCounter, *, margin: float, limit: int) -> None:
        self._scorer, self._line, self._meter = scorer, line, meter
        self._margin, self._limit = margin, limit
        self.lines = [*scorer.lines, line]

    def pick(self, view: View, rows: Tensor, candidates: Tensor, slm: Tensor) -> tuple[Tensor, Tensor]:
        """The selector's pick, or the LLM's."""
        scores = self._scorer.scores(view, rows, candidates, slm)
        best = scores.argmax(-1)
        unsure = margins(scores) < self._margin
        asked = unsure & several(slm) & (self._meter.used(view, rows) < self._limit)
        going_up = asked.nonzero()[:, 0]
        if len(going_up):
            self._meter.count(view, rows[going_up])
            best[going_up] = among_legal(self._line.log_probs(rows[going_up]), candidates[going_up], slm[going_up])
        return candidates.gather(1, best[:, None])[:, 0], asked


def several(slm: Tensor) -> Tensor:
    """``[N]`` bool: more than one of the candidates is legal, from their log-probabilities ``[N, K]``."""
    return (slm > -torch.inf).sum(-1) > 1


def among_legal(llm: Tensor, candidates: Tensor, slm: Tensor) -> Tensor:
    """``[N]``: place of the legal candidate that the LLM, ``[N, V]``, holds most likely."""
    return llm.gather(1, candidates).masked_fill(slm == -torch.inf, -torch.inf).argmax(-1)


def margins(scores: Tensor) -> Tensor:
    """``selectors.confidence_margin`` for many rows: from ``[N, K]`` to ``[N]``, 1 where K is 1."""
    if scores.shape[1] < 2:
        return torch.ones(scores.shape[0], device=scores.device)
    best = scores.softmax(-1).topk(2).values
    return best[:, 0] - best[:, 1]
