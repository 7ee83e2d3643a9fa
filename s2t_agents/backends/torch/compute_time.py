"""What a generation has used of the model: its share of every forward that it took part in."""

from __future__ import annotations


class Meter:
    """Seconds, counted up. Whoever waits for the result of a step is the only one who reads it.

    Attributes:
        seconds: so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def add(self, seconds: float) -> None:
        """Count some more."""
        self.seconds += seconds
