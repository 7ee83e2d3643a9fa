"""What a ledger keeps of each generation, beside its sums and receipts."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError


@dataclass(frozen=True)
class Recording:
    """What a ledger keeps beside sums and receipts; nothing by default.

    Attributes:
        steps: every step: token id, who picked it, entropy, candidates with their scores, times.
        text: of the steps' tokens and candidates, and the end of the prompt. Readers of the ledger read
            conversations then.

    Raises:
        ConfigError: text without steps.
    """

    steps: bool = False
    text: bool = False

    def __post_init__(self) -> None:
        """Check that there are steps to have a text."""
        if self.text and not self.steps:
            raise ConfigError("Recording(text=True) has no steps to record the text of.", hint="Add steps=True.")
