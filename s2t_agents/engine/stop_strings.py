"""Stop strings over streamed text: nothing that may still become a stop string is shown."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import ConfigError


class StopStrings:
    """Cuts streamed text before the first stop string to be completed.

    When two are completed by the same character, the one that began earlier counts. The outcome does not depend
    on how the text was split into pushes.

    Args:
        stops: the stop strings; none at all is fine, an empty one is not.

    Raises:
        ConfigError: a stop that is not a non-empty string.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = [stops] if isinstance(stops, str) else list(stops)
        for stop in self._stops:
            if not isinstance(stop, str) or not stop:
                raise ConfigError(
                    f"stop={stop!r} cannot be waited for.", hint="Give strings of at least one character."
                )
        self._held = ""
        self._stopped = False

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was completed; everything pushed later is dropped."""
        return self._stopped

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next piece of text.

        Returns:
            The text that is safe to show now, and whether a stop string was completed.
        """
        if self._stopped:
            return "", True
        seen = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := seen.find(stop)) >= 0]
        if found:
            self._held, self._stopped = "", True
            return seen[: min(found)[1]], True
        keep = len(seen) - self._undecided(seen)
        self._held = seen[keep:]
        return seen[:keep], False

    def flush(self) -> str:
        """The text held back so far: generation ended, so it is no stop string after all."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, seen: str) -> int:
        """Length of the longest end of ``seen`` that begins a stop string."""
        return max(
            (
                length
                for stop in self._stops
                for length in range(1, min(len(stop), len(seen) + 1))
                if seen.endswith(stop[:length])
            ),
            default=0,
        )
