"""Are the rates that a selector was calibrated to still the rates that it meets?"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator

from ..fork_safety import hold_while_forking
from ..types import Step
from .config import Calibration

_log = logging.getLogger(__name__)

Z95 = 1.959964
Z_LIVE = 3.0
"""Standard errors around a live rate: it is looked at again after every answer, and must not cry wolf."""
FEWEST = 1000
"""Steps before anything is said (triggered steps, for the escalation rate: a tenth of it)."""
SLACK = 0.25
"""Share by which a rate may differ besides: calibration reads the SLM's own answers, use follows corrected ones."""
FEWEST_ANSWERS = 20
"""Answers before anything is said: the steps of one answer are alike, so few answers say little."""


def wilson(hits: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval of a share, 95% by default, the share itself in it; (0, 1) when nothing was seen."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = hits / n, z**2
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half))  # rounding may part 0 and 1 from theirs


class LiveRate:
    """A share of steps that come answer by answer; nothing but sums is kept."""

    def __init__(self) -> None:
        self.answers = self.hits = self.steps = 0
        self._hits2 = self._hits_steps = self._steps2 = 0

    def add(self, hits: int, steps: int) -> None:
        """One answer."""
        if steps:
            self.answers += 1
            self.hits += hits
            self.steps += steps
            self._hits2 += hits * hits
            self._hits_steps += hits * steps
            self._steps2 += steps * steps

    @property
    def rate(self) -> float:
        """Hits per step so far."""
        return self.hits / max(1, self.steps)

    @property
    def interval(self) -> tuple[float, float]:
        """Where the true rate lies, answers (not steps) being independent; never narrower than for single steps."""
        low, high = wilson(self.hits, self.steps, Z_LIVE)
        if self.answers < 2:
            return 0.0, 1.0
        p = self.rate
        spread = max(0.0, self._hits2 - 2 * p * self._hits_steps + p * p * self._steps2)
        half = Z_LIVE * math.sqrt(spread * self.answers / (self.answers - 1)) / self.steps
        return max(0.0, min(low, p - half)), min(1.0, max(high, p + half))

    def left(self, expected: tuple[float, float], fewest: int) -> bool:
        """Whether enough was seen, and it shares nothing with the expected interval and the slack around it."""
        if self.answers < FEWEST_ANSWERS or self.steps < fewest:
            return False
        low, high = self.interval
        return low > expected[1] * (1 + SLACK) or high < expected[0] * (1 - SLACK)


class DriftWatch:
    """Counts live steps and says once when a rate has left its calibrated interval. Thread-safe.

    Args:
        calibration: what the selector expects.
        escalations: whether LLM questions follow the calibrated margin alone, so that their rate can be compared.
        fewest: steps before anything is said.
    """

    def __init__(self, calibration: Calibration, *, escalations: bool = False, fewest: int = FEWEST) -> None:
        self._calibration, self._escalations, self._fewest = calibration, escalations, fewest
        self._lock = threading.RLock()  # garbage collection may end a generation inside a block of ours
        hold_while_forking(self, "_lock")
        self._triggers, self._questions = LiveRate(), LiveRate()
        self._said = False

    def watching(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The same steps; at their end, or where they are left, they are counted, and a warning is logged if due."""
        asked = triggered = going_up = 0
        try:
            for step in steps:
                asked += step.entropy is not None  # tokens that nobody had to choose say nothing
                triggered += step.triggered
                going_up += step.escalation is not None
                yield step
        finally:
            said = self.see(asked, triggered, going_up)
            if said is not None:
                _log.warning(said)

    def see(self, steps: int, triggered: int, going_up: int = 0) -> str | None:
        """Take the counts of one answer: steps, critical ones, and those of them that were to go up to the LLM.

        Returns:
            A warning, the first time that a live rate's interval and the calibrated one share nothing.
        """
        expected = self._calibration
        with self._lock:
            if self._said:
                return None
            self._triggers.add(triggered, steps)
            self._questions.add(going_up, triggered)
            told = []
            if self._triggers.left(expected.trigger_rate_ci95, self._fewest):
                told.append(_told("steps were critical", self._triggers, expected.trigger_rate_ci95))
            if self._escalations and self._questions.left(expected.escalation_rate_ci95, self._fewest // 10):
                what = "critical steps were for the LLM"
                told.append(_told(what, self._questions, expected.escalation_rate_ci95))
            if not told:
                return None
            self._said = True
        return (
            f"{' '.join(told)} These prompts are unlike those that the selector was calibrated on: run `s2t calibrate` "
            "on rollouts of prompts like them, or give a trigger of your own."
        )


def _told(what: str, live: LiveRate, expected: tuple[float, float]) -> str:
    low, high = live.interval
    return (
        f"{live.rate:.1%} of {live.steps} {what} ({low:.1%} to {high:.1%}); "
        f"the calibration expects {expected[0]:.1%} to {expected[1]:.1%}."
    )
