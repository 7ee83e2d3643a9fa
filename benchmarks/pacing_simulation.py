"""What pacing is worth: the same run's margins under first come, first served, under pacing, and with hindsight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from s2t_agents.escalation import Pace


@dataclass(frozen=True)
class Simulation:
    """Gains of three ways to spend the same number of escalations on the same selections.

    Attributes:
        first_come: gain of asking until the budget is gone.
        paced: gain of ``Pace``.
        optimum: gain of the best choice with hindsight.
    """

    first_come: float
    paced: float
    optimum: float

    @property
    def share_first_come(self) -> float:
        """Of the optimum, in [0, 1]."""
        return self.first_come / self.optimum if self.optimum else 1.0

    @property
    def share_paced(self) -> float:
        """Of the optimum, in [0, 1]."""
        return self.paced / self.optimum if self.optimum else 1.0


def simulate(
    margins: Sequence[float],
    escalations: int,
    *,
    gains: Sequence[float] | None = None,
    at_most: float = 1.0,
    expected: int | None = None,
    known: Sequence[float] = (),
) -> Simulation:
    """Spend ``escalations`` on a run's selections, in their order.

    Args:
        margins: of the selections, in [0, 1].
        escalations: that can be paid for.
        gains: what an escalation there is worth; None takes 1 - margin.
        at_most: margins from here on are never escalated.
        expected: selections that pacing was told to expect; None tells it the truth.
        known: margins that pacing knows from before.
    """
    worth = gains if gains is not None else [1 - margin for margin in margins]
    unsure = [gain for margin, gain in zip(margins, worth, strict=True) if margin < at_most]
    pace = Pace(expected or max(1, len(margins)), known)
    paced, left = 0.0, escalations
    for margin, gain in zip(margins, worth, strict=True):
        if left and pace.decide(margin, left, at_most=at_most):
            paced, left = paced + gain, left - 1
    return Simulation(sum(unsure[:escalations]), paced, sum(sorted(unsure, reverse=True)[:escalations]))
