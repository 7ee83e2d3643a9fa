"""Pacing: what is left of a budget is spent where the selector is least sure, over the rest of the run.

First come, first served spends a budget on the first doubts of a run. Here every selection asks anew: of the
selections still to come, which share can be paid for? One is escalated when its margin lies in that lowest share of the
margins seen. Where the budget runs ahead the bar falls, where it is left over the bar rises: the re-solving rule for
online selection with a budget (Jasin & Kumar 2012, doi 10.1287/moor.1120.0537, there for network revenue).
"""

from __future__ import annotations

import math
import threading
from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch

from ..budget import Budget, Charge
from ..budget.quantities import NOTHING, plus, public, quantities_of
from ..errors import ConfigError, InputError
from ..fork_safety import hold_while_forking
from ..ledger import GenerationRecord, Receipt
from ..selectors.base import confidence_margin

OPENING = tuple((2 * i + 1) / 16 for i in range(8))
"""Before anything was seen, margins are taken to be spread evenly; every one seen takes the place of one of these."""
REMEMBERED = 4096
"""Margins kept; a longer run has taught the distribution by then."""
TAIL = 0.05
"""A run that is longer than expected is expected to last this share of the expectation longer, at every step."""


class Pace:
    """One run's pace: counts selections, remembers their margins. Shared by all generations of the run.

    Args:
        selections: expected in the whole run.
        margins: known from before (a calibration, receipts); empty begins with ``OPENING``.
    """

    def __init__(self, selections: int, margins: Sequence[float] = ()) -> None:
        self._expected = selections
        self._assumed = [] if margins else list(OPENING)
        self._margins = sorted(margins) or list(OPENING)
        self._seen = self._questions = 0
        self._paid = NOTHING
        self._lock = threading.Lock()
        hold_while_forking(self, "_lock")

    def should_escalate(self, margin: float, budget: Budget, *, at_most: float = 1.0) -> bool:
        """Whether a selection with this confidence margin is put to the LLM.

        Where nothing is left the answer is as without pacing: the budget itself refuses, and the message says so.

        Args:
            margin: of this selection, in [0, 1].
            budget: what is left is read from it.
            at_most: margins from here on are never escalated.
        """
        return self.decide(margin, self.affordable(budget), at_most=at_most)

    def decide(self, margin: float, affordable: float, *, at_most: float = 1.0) -> bool:
        """As :meth:`should_escalate`, with so many escalations left to pay for."""
        with self._lock:
            bar = self._bar(affordable)
            self._remember(margin)
        return margin < min(bar, at_most)

    def add_charge(self, charge: Charge) -> None:
        """Count what an escalation cost: the next ones are expected to cost the mean."""
        with self._lock:
            self._paid = plus(self._paid, quantities_of(charge))
            self._questions += 1

    def affordable(self, budget: Budget) -> float:
        """Escalations that what is left would pay for, at the mean cost so far; infinite without a limit."""
        left = budget.available()
        with self._lock:
            paid, n = self._paid, self._questions
        per = {"escalations": 1.0}
        if n:
            per |= {"usd": float(public("usd", paid.usd)) / n, "llm_tokens": paid.llm_tokens / n}
        return min((float(left[unit]) / cost for unit, cost in per.items() if unit in left and cost), default=math.inf)

    def _remember(self, margin: float) -> None:
        self._seen += 1
        if self._assumed:
            nearest = min(self._assumed, key=lambda assumed: abs(assumed - margin))
            self._assumed.remove(nearest)
            self._margins.remove(nearest)
        if len(self._margins) < REMEMBERED:
            insort(self._margins, margin)

    def _bar(self, affordable: float) -> float:
        """The margin under which the affordable share of the selections still to come will lie."""
        if affordable < 1:
            return math.inf  # the budget itself refuses, and says so
        to_come = max(self._expected - self._seen, TAIL * self._expected, 1.0)
        rank = affordable / to_come * len(self._margins)
        if rank >= len(self._margins):
            return math.inf
        low = int(rank)
        below = self._margins[low - 1] if low else 0.0
        return below + (rank - low) * (self._margins[low] - below)


@dataclass(frozen=True)
class Pacing:
    """Spreads each budget over a run of so many selections.

    Attributes:
        selections: critical steps expected in a run (a ledger's ``triggers`` of earlier runs say). Guess low rather
            than high: what a run saves for steps that never come is lost.
        margins: confidence margins known from before, such as ``margins_of(ledger.records())``.

    Raises:
        ConfigError: fewer than 1 selection, or a margin outside [0, 1].
    """

    selections: int
    margins: tuple[float, ...] = ()
    _paces: WeakKeyDictionary[object, Pace] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        hold_while_forking(self, "_lock")
        if self.selections < 1:
            raise ConfigError(f"pacing over {self.selections} selections; a run has at least 1.")
        if not all(0 <= margin <= 1 for margin in self.margins):
            raise ConfigError("pacing was given margins outside [0, 1].", hint="Use them from margins_of(records).")

    def pace_for(self, budget: Budget) -> Pace:
        """The pace of the run that this budget belongs to: one for a root budget, its views and all below them."""
        with self._lock:
            if budget.run not in self._paces:
                self._paces[budget.run] = Pace(self.selections, self.margins)
            return self._paces[budget.run]

    def __reduce__(self) -> tuple[type[Pacing], tuple[int, tuple[float, ...]]]:
        """Pickles as its settings; a run's pace stays in its process."""
        return Pacing, (self.selections, self.margins)


def margins_of(records: Iterable[GenerationRecord]) -> list[float]:
    """The confidence margins of every selection that was escalated or refused, as recorded, in order.

    Raises:
        InputError: a receipt without scores.
    """
    return [_margin(receipt) for record in records for receipt in record.receipts]


def _margin(receipt: Receipt) -> float:
    scores = [c.selector if c.selector is not None else c.slm for c in receipt.candidates]
    if not scores or any(score is None for score in scores):
        raise InputError("a receipt has no local scores, so its margin is unknown.")
    return min(1.0, max(0.0, confidence_margin(torch.tensor(scores))))
