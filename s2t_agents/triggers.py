"""Triggers: is this step critical? Small callables on a ``Proposal``, composed with ``|`` and ``&``.

>>> trigger = entropy(above=0.6) | margin(below=0.1)

A trigger reads the SLM alone (no LLM runs for it). To add one, subclass ``Trigger`` or wrap a function in
``when``.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from .errors import ConfigError
from .proposal import Proposal


class Trigger(ABC):
    """Base of all triggers: called with a proposal, says whether to look twice."""

    @abstractmethod
    def __call__(self, proposal: Proposal) -> bool:
        """Whether this step is critical."""

    def __or__(self, other: Trigger) -> Trigger:
        return when(lambda proposal: self(proposal) or other(proposal), f"({self!r} | {other!r})")

    def __and__(self, other: Trigger) -> Trigger:
        return when(lambda proposal: self(proposal) and other(proposal), f"({self!r} & {other!r})")


class when(Trigger):
    """Any function of a proposal as a trigger."""

    def __init__(self, condition: Callable[[Proposal], bool], name: str = "when(...)") -> None:
        self._condition, self._name = condition, name

    def __call__(self, proposal: Proposal) -> bool:
        """Whether the condition holds."""
        return self._condition(proposal)

    def __repr__(self) -> str:
        return self._name


class entropy(Trigger):
    """The SLM's distribution is spread: entropy of at least ``above`` nats (the PPS trigger)."""

    def __init__(self, *, above: float) -> None:
        self.above = _finite("entropy(above=)", above)

    def __call__(self, proposal: Proposal) -> bool:
        """Whether the step's entropy reaches the threshold."""
        return proposal.entropy >= self.above

    def __repr__(self) -> str:
        return f"entropy(above={self.above:g})"


class margin(Trigger):
    """The SLM's two best tokens are close: probabilities less than ``below`` apart."""

    def __init__(self, *, below: float) -> None:
        self.below = _finite("margin(below=)", below)

    def __call__(self, proposal: Proposal) -> bool:
        """Whether the two best tokens are closer than the threshold."""
        return proposal.margin < self.below

    def __repr__(self) -> str:
        return f"margin(below={self.below:g})"


class probe(Trigger):
    """A logistic probe on the SLM's last hidden state and entropy finds the steps where an LLM would disagree.

    Args:
        weight: ``[H + 1]``: one per hidden unit, then the entropy's.
        bias: added before the sigmoid.
        above: probability of disagreement from which a step is critical.
    """

    def __init__(self, weight: Tensor, bias: float, *, above: float) -> None:
        self.weight, self.bias, self.above = weight, bias, _finite("probe(above=)", above)

    def probability(self, proposal: Proposal) -> float:
        """Of a disagreement between SLM and LLM at this step."""
        hidden = proposal.hidden.float()
        weight = self.weight.to(hidden.device)
        return float(torch.sigmoid(hidden @ weight[:-1] + proposal.entropy * weight[-1] + self.bias))

    def __call__(self, proposal: Proposal) -> bool:
        """Whether a disagreement is likely enough."""
        return self.probability(proposal) >= self.above

    def __repr__(self) -> str:
        return f"probe(above={self.above:g})"


class at_random(Trigger):
    """A share of all steps, whatever the SLM says: the baseline every trigger has to beat."""

    def __init__(self, rate: float, *, seed: int = 0) -> None:
        self.rate, self._draw = _finite("at_random(rate)", rate), random.Random(seed)

    def __call__(self, proposal: Proposal) -> bool:
        """Whether this step was drawn."""
        return self._draw.random() < self.rate

    def __repr__(self) -> str:
        return f"at_random({self.rate:g})"


def always() -> Trigger:
    """Every step."""
    return when(lambda _: True, "always()")


def never() -> Trigger:
    """No step."""
    return when(lambda _: False, "never()")


def _finite(what: str, value: float) -> float:
    if not math.isfinite(value):
        raise ConfigError(f"{what} is {value}; it must be a finite number.")
    return float(value)
