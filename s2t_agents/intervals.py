"""Confidence intervals of shares, which stand beside every accuracy and rate."""

from __future__ import annotations

import math

Z95 = 1.959964
"""Standard errors of a 95% interval, to either side."""


def wilson(hits: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval of a share, 95% by default, which contains the share; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = hits / n, z**2
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half))  # against rounding at 0 and 1
