"""The deadline of a generation: it ends in the queue, between the chunks of its prompt, and while a server is waited
for."""

from __future__ import annotations

from typing import Protocol


class Deadline(Protocol):
    """When a generation has to end. It may move meanwhile, so ``check`` is asked where it seems to have passed."""

    def left_s(self) -> float:
        """Seconds until ``check`` is to be called, at most 0 where it is now; infinite without a deadline."""
        ...

    def end_s(self) -> float:
        """Seconds until the generation ends, as far as is known; infinite if never.

        No question to an LLM outlasts it, and no wait for the model's own server, which ``check``s then.
        """
        ...

    def check(self) -> None:
        """Go on, if there is time after all.

        Raises:
            S2TError: why the generation has to end.
        """
        ...
