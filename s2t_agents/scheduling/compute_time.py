"""Compute time of one generation: its share of every forward that it took part in."""

from __future__ import annotations


class ComputeTime:
    """Seconds, counted up. Only the caller that waits for a step reads it.

    Attributes:
        seconds: so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def add(self, seconds: float) -> None:
        """Count some more."""
        self.seconds += seconds
