"""Which LLM is asked, and when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..backends.deadline import Deadline
from ..budget import Budget
from ..errors import ConfigError, UnpricedModel
from ..llms.base import LLMSelector
from ..llms.question import Conversation
from ..types import EscalationRecord
from .pacing import Pacing
from .paid_groups import PaidGroups, check_appendable
from .session import EscalationSession, llm_deadline_s

LONGEST_HOLD_S = 86_400
DEFAULT_MARGIN = 0.9
"""Where no selector was calibrated: the LLM is asked unless the best candidate stands this far above the second."""


@dataclass(frozen=True)
class Escalation:
    """Which LLM is asked, and when.

    Attributes:
        llm: the LLM.
        margin: selections with a confidence margin under it are escalated, in [0, 1]; None takes the selector's
            calibrated threshold, or ``DEFAULT_MARGIN`` where there is no calibrated selector.
        pacing: spreads a budget over a run, so that it is spent where the selector is least sure; None asks first
            come, first served.
        record: a file (JSON lines) that takes every paid selection as a training group. It holds the conversations
            that were asked about, as token ids. Where others keep the file locked, a generation waits a second for
            it, and then records nothing.
        hold_s: seconds after which what is held for a question comes back, should this process be killed; longer than
            the LLM's own deadline. None takes a minute more than that deadline, and five minutes at least; an hour for
            an LLM without a deadline, such as a ``LocalLLM``.

    Raises:
        ConfigError: a margin out of range, a record in a folder that is not there or in a file that holds something
            else, or a hold that would lapse while the LLM may still answer.
    """

    llm: LLMSelector
    margin: float | None = None
    pacing: Pacing | None = None
    record: str | Path | None = None
    hold_s: float | None = None

    def __post_init__(self) -> None:
        if self.margin is not None and not 0 <= self.margin <= 1:
            raise ConfigError(f"escalation margin is {self.margin}; it must lie in [0, 1].")
        if self.record is not None:
            check_appendable(Path(self.record))
        deadline = llm_deadline_s(self.llm)
        if self.hold_s is not None and not (deadline or 0) < self.hold_s <= LONGEST_HOLD_S:
            raise ConfigError(
                f"hold_s is {self.hold_s}; it must lie above {deadline or 0} seconds, the LLM's deadline, and at most"
                f" at {LONGEST_HOLD_S}.",
                hint="Leave it out for a minute more than the deadline.",
            )

    @property
    def changing_answers(self) -> tuple[LLMSelector, float | None, Pacing | None]:
        """The settings that may change an answer."""
        return self.llm, self.margin, self.pacing

    def check_price(self, budget: Budget | None) -> None:
        """Refuse an LLM of unknown price under a dollar limit.

        Raises:
            UnpricedModel: naming both.
        """
        if self.llm.price is None and budget is not None and budget.in_dollars:
            raise UnpricedModel(
                f"{self.llm.name!r} has no known price, and the budget {budget.name!r} is limited in dollars.",
                hint="Give the LLM a price (TokenPrice), or limit escalations or llm_tokens instead.",
            )

    def open_session(
        self,
        budget: Budget | None,
        *,
        threshold: float,
        on_asked: Callable[[EscalationRecord], None] | None = None,
        conversation: Conversation | None = None,
        deadline: Deadline | None = None,
    ) -> EscalationSession:
        """The escalations of one generation.

        Args:
            budget: what they may cost; None sets no limit.
            threshold: the selector's calibrated margin.
            on_asked: called after every question.
            conversation: what is answered, for an LLM with another tokenizer.
            deadline: of the generation.
        """
        return EscalationSession(
            self.llm,
            budget,
            self.margin if self.margin is not None else threshold,
            pace=self.pacing.pace_for(budget) if self.pacing is not None and budget is not None else None,
            groups=PaidGroups(Path(self.record), self.llm.name) if self.record is not None else None,
            on_asked=on_asked,
            hold_s=self.hold_s,
            conversation=conversation,
            deadline=deadline,
        )
