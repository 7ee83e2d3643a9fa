"""Triggers decide at which steps candidates are re-ranked: callables on a ``Proposal``, composed by ``|`` and ``&``.

>>> trigger = entropy(above=0.6) | margin(below=0.1)

A trigger reads only the SLM's proposal. To add one, subclass ``Trigger`` or wrap a function in ``when``. One object
serves all generations, at once: it keeps nothing of a single one. Its ``repr`` is part of the key of LangChain's cache.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .backends.base import Need
from .backends.fingerprint import tensors_fingerprint
from .errors import ConfigError
from .identity import new_token, token_of
from .proposal import Proposal


class Trigger(ABC):
    """Base class of triggers.

    A subclass whose ``repr`` tells every setting shares cached answers with its equals; without a ``repr`` of its own,
    an object shares them with no other.

    Attributes:
        needs: what the SLM's backend must be capable of; an engine with another one is refused.
    """

    needs: tuple[Need, ...] = ()

    @abstractmethod
    def __call__(self, proposal: Proposal) -> bool:
        """Whether to re-rank the candidates at this step."""

    def __repr__(self) -> str:
        return token_of(self)

    def __or__(self, other: Trigger) -> Trigger:
        return any_of(self, other)

    def __and__(self, other: Trigger) -> Trigger:
        return all_of(self, other)


class when(Trigger):
    """Any function of a proposal as a trigger.

    Args:
        condition: whether to re-rank the candidates.
        name: its ``repr``; triggers of one name share cached answers. By default no other trigger has the same.
    """

    def __init__(self, condition: Callable[[Proposal], bool], name: str | None = None) -> None:
        self._condition = condition
        self._name = name or new_token(f"when({getattr(condition, '__name__', type(condition).__name__)})")

    def __call__(self, proposal: Proposal) -> bool:
        """Whether the condition holds."""
        return self._condition(proposal)

    def __repr__(self) -> str:
        return self._name


class any_of(Trigger):
    """Triggers where any of these does, asked in their order; ``a | b``."""

    def __init__(self, *triggers: Trigger) -> None:
        self.triggers, self.needs = triggers, _needs_of(triggers)

    def __call__(self, proposal: Proposal) -> bool:
        """Whether one of them triggers."""
        return any(trigger(proposal) for trigger in self.triggers)

    def __repr__(self) -> str:
        return f"({' | '.join(map(repr, self.triggers))})"


class all_of(Trigger):
    """Triggers where all of these do, asked in their order; ``a & b``."""

    def __init__(self, *triggers: Trigger) -> None:
        self.triggers, self.needs = triggers, _needs_of(triggers)

    def __call__(self, proposal: Proposal) -> bool:
        """Whether all of them trigger."""
        return all(trigger(proposal) for trigger in self.triggers)

    def __repr__(self) -> str:
        return f"({' & '.join(map(repr, self.triggers))})"


class entropy(Trigger):
    """Triggers if the entropy of the SLM's next-token distribution is at least ``above`` nats (the PPS trigger)."""

    def __init__(self, *, above: float) -> None:
        self.above = _check_finite("entropy(above=)", above)

    def __call__(self, proposal: Proposal) -> bool:
        """Whether the step's entropy reaches the threshold."""
        return proposal.entropy >= self.above

    def __repr__(self) -> str:
        return f"entropy(above={self.above})"


class margin(Trigger):
    """Triggers if the probabilities of the SLM's two best tokens differ by less than ``below``."""

    def __init__(self, *, below: float) -> None:
        self.below = _check_finite("margin(below=)", below)

    def __call__(self, proposal: Proposal) -> bool:
        """Whether the two best tokens are closer than the threshold."""
        return proposal.margin < self.below

    def __repr__(self) -> str:
        return f"margin(below={self.below})"


class probe(Trigger):
    """Triggers by a logistic probe on the SLM's last hidden state and entropy, which predicts an LLM's disagreement.

    Args:
        weight: ``[H + 1]``: one per hidden unit, then the entropy's.
        bias: added before the sigmoid.
        above: threshold of the probability of a disagreement.
    """

    needs = ("hidden_states",)

    def __init__(self, weight: Tensor, bias: float, *, above: float) -> None:
        self.weight, self.bias, self.above = weight, bias, _check_finite("probe(above=)", above)

    def probability(self, proposal: Proposal) -> float:
        """Predicted probability that the LLM disagrees with the SLM at this step."""
        hidden = proposal.hidden.float()
        weight = self.weight.to(hidden.device)
        return float(torch.sigmoid(hidden @ weight[:-1] + proposal.entropy * weight[-1] + self.bias))

    def __call__(self, proposal: Proposal) -> bool:
        """Whether the probability of a disagreement reaches the threshold."""
        return self.probability(proposal) >= self.above

    def __repr__(self) -> str:
        weights = tensors_fingerprint([self.weight])
        return f"probe(above={self.above}, bias={self.bias}, weight={weights})"


class at_random(Trigger):
    """Triggers at a random share of all steps, the baseline for every trigger."""

    def __init__(self, rate: float, *, seed: int = 0) -> None:
        self.rate, self.seed = _check_finite("at_random(rate)", rate), seed
        self._draw = random.Random(seed)

    def __call__(self, proposal: Proposal) -> bool:
        """Whether this step was drawn."""
        return self._draw.random() < self.rate

    def __repr__(self) -> str:
        return f"at_random({self.rate}, seed={self.seed})"


def always() -> Trigger:
    """Every step."""
    return when(_at_all, "always()")


def never() -> Trigger:
    """No step."""
    return when(_at_none, "never()")


def _needs_of(triggers: Iterable[Trigger]) -> tuple[Need, ...]:
    return tuple(need for trigger in triggers for need in trigger.needs)


def _at_all(proposal: Proposal) -> bool:
    return True


def _at_none(proposal: Proposal) -> bool:
    return False


def _check_finite(what: str, value: float) -> float:
    if not math.isfinite(value):
        raise ConfigError(f"{what} is {value}; it must be a finite number.")
    return float(value)
