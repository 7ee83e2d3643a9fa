"""Drift detection: whether trigger and escalation rates in use are still those of the calibration."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..fork_safety import hold_while_forking
from ..intervals import wilson
from ..types import Step
from .config import Calibration

_log = logging.getLogger(__name__)

Z_LIVE = 3.0
"""Standard errors of a live rate's interval: wide, because the test is repeated after every answer."""
FEWEST = 1000
"""Minimum number of steps for a warning (for the escalation rate, a tenth of it in triggered steps)."""
SLACK = 0.25
"""Relative tolerance of a rate: calibration follows the SLM's own answers, use follows corrected ones."""
FEWEST_ANSWERS = 20
"""Minimum number of answers for a warning, since the steps of one answer are correlated."""


class LiveRate:
    """A running share of steps, clustered by answer; keeps only sums."""

    def __init__(self) -> None:
        self.answers = self.hits = self.steps = 0
        self._hits2 = self._hits_steps = self._steps2 = 0

    def add(self, hits: int, steps: int) -> None:
        """Add one answer."""
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
        """Confidence interval, clustered by answer; never narrower than for independent steps."""
        low, high = wilson(self.hits, self.steps, Z_LIVE)
        if self.answers < 2:
            return 0.0, 1.0
        p = self.rate
        spread = max(0.0, self._hits2 - 2 * p * self._hits_steps + p * p * self._steps2)
        half = Z_LIVE * math.sqrt(spread * self.answers / (self.answers - 1)) / self.steps
        return max(0.0, min(low, p - half)), min(1.0, max(high, p + half))

    def has_left(self, expected: tuple[float, float], fewest: int) -> bool:
        """Whether there are enough steps, and the interval is disjoint from the expected one plus ``SLACK``."""
        if self.answers < FEWEST_ANSWERS or self.steps < fewest:
            return False
        low, high = self.interval
        return low > expected[1] * (1 + SLACK) or high < expected[0] * (1 - SLACK)


class AnswerCounts:
    """Steps of one answer: those that were chosen, the triggered ones, and those to be escalated."""

    def __init__(self) -> None:
        self.steps = self.triggered = self.escalated = 0

    def add(self, step: Step) -> None:
        """Count a step."""
        self.steps += step.entropy is not None  # forced tokens do not count
        self.triggered += step.triggered
        self.escalated += step.escalation is not None


class DriftWatch:
    """Counts steps in use and warns once when a rate has left its calibrated interval. Thread-safe.

    Args:
        calibration: the selector's calibration.
        escalations: whether escalations follow the calibrated margin alone, so that their rate is comparable.
        fewest: minimum number of steps for a warning.

    Attributes:
        trigger_rate: triggered steps per step so far.
        escalation_rate: steps to be escalated per triggered step so far.
        watches_escalations: whether the escalation rate is compared.
    """

    def __init__(self, calibration: Calibration, *, escalations: bool = False, fewest: int = FEWEST) -> None:
        self._calibration, self.watches_escalations, self._fewest = calibration, escalations, fewest
        self._lock = threading.RLock()  # garbage collection may close a generation while this thread holds it
        hold_while_forking(self, "_lock")
        self.trigger_rate, self.escalation_rate = LiveRate(), LiveRate()
        self._warned = False

    @contextmanager
    def counting(self) -> Iterator[AnswerCounts]:
        """Counts of one answer; when the block ends, however it does, they are added, and a warning logged if due."""
        counts = AnswerCounts()
        try:
            yield counts
        finally:
            warning = self.see(counts.steps, counts.triggered, counts.escalated)
            if warning is not None:
                _log.warning(warning)

    def see(self, steps: int, triggered: int, escalated: int = 0) -> str | None:
        """Add the counts of one answer: steps, triggered ones, and those to be escalated.

        Returns:
            A warning, the first time that a live rate's interval is disjoint from the calibrated one.
        """
        expected = self._calibration
        with self._lock:
            if self._warned:
                return None
            self.trigger_rate.add(triggered, steps)
            self.escalation_rate.add(escalated, triggered)
            warnings = []
            if self.trigger_rate.has_left(expected.trigger_rate_ci95, self._fewest):
                warnings.append(_rate_text("steps were critical", self.trigger_rate, expected.trigger_rate_ci95))
            if self.watches_escalations and self.escalation_rate.has_left(
                expected.escalation_rate_ci95, self._fewest // 10
            ):
                what = "critical steps were for the LLM"
                warnings.append(_rate_text(what, self.escalation_rate, expected.escalation_rate_ci95))
            if not warnings:
                return None
            self._warned = True
        return (
            f"{' '.join(warnings)} These prompts are unlike those that the selector was calibrated on: "
            "run `s2t calibrate` on rollouts of prompts like them, or give a trigger of your own."
        )


def _rate_text(what: str, live: LiveRate, expected: tuple[float, float]) -> str:
    low, high = live.interval
    return (
        f"{live.rate:.1%} of {live.steps} {what} ({low:.1%} to {high:.1%}); "
        f"the calibration expects {expected[0]:.1%} to {expected[1]:.1%}."
    )
