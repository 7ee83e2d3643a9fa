"""Are the rates that a selector was calibrated to still the rates that it meets?"""

from __future__ import annotations

import math
import threading

from .config import Calibration

Z95 = 1.959964
FEWEST = 1000
"""Steps before anything is said: the steps of one answer are alike, so few answers say little."""


def wilson(hits: float, n: int) -> tuple[float, float]:
    """95% Wilson score interval of a share; (0, 1) when nothing was seen."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = hits / n, Z95**2
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


class DriftWatch:
    """Counts live steps and says once when the trigger rate has left its calibrated interval. Thread-safe.

    Args:
        calibration: what the selector expects.
        fewest: steps before anything is said.
    """

    def __init__(self, calibration: Calibration, *, fewest: int = FEWEST) -> None:
        self._calibration, self._fewest = calibration, fewest
        self._lock = threading.Lock()
        self.steps = self.triggered = 0
        self._said = False

    def see(self, steps: int, triggered: int) -> str | None:
        """Take the counts of one answer.

        Returns:
            A warning, the first time that the live rate's 95% interval and the calibrated one share nothing.
        """
        with self._lock:
            self.steps += steps
            self.triggered += triggered
            low, high = wilson(self.triggered, self.steps)
            expected = self._calibration.trigger_rate_ci95
            if self._said or self.steps < self._fewest or (low <= expected[1] and high >= expected[0]):
                return None
            self._said = True
        return (
            f"{self.triggered / self.steps:.1%} of {self.steps} steps were critical ({low:.1%} to {high:.1%}); the "
            f"calibration expects {self._calibration.trigger_rate:.1%} ({expected[0]:.1%} to {expected[1]:.1%}). "
            "These prompts are unlike those it was calibrated on: run `s2t calibrate` on some of them."
        )
