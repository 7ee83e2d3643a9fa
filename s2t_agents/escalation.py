"""When a selection goes up to the LLM, and what it may cost: hold, ask, settle.

selector unsure? ──no──> its pick stands
     │yes
budget holds the reservation? ──no──> refused: its pick stands (or BudgetExceeded, as the budget says)
     │yes
LLM answers? ──no──> hold released, failed: its pick stands
     │yes
settle what it really cost; the LLM's pick stands
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from .budget import Amount, Budget
from .errors import BudgetError, BudgetExceeded, ConfigError, S2TError, StoreUnavailable, UnpricedModel
from .selectors.llm import LLMSelector, LLMSession
from .types import Charge, EscalationReport

DEFAULT_MARGIN = 0.9
"""Where no selector was calibrated: the LLM is asked unless the best candidate stands this far above the second."""


@dataclass(frozen=True)
class Escalation:
    """Which LLM is asked, and when.

    Attributes:
        llm: who picks.
        margin: selections with a confidence margin under it go up, in [0, 1]; None takes the selector's
            calibrated threshold, or ``DEFAULT_MARGIN`` where there is no calibrated selector.
    """

    llm: LLMSelector
    margin: float | None = None

    def __post_init__(self) -> None:
        if self.margin is not None and not 0 <= self.margin <= 1:
            raise ConfigError(f"escalation margin is {self.margin}; it must lie in [0, 1].")

    def check_price(self, budget: Budget | None) -> None:
        """Refuse an LLM whose price nobody knows under a dollar limit.

        Raises:
            UnpricedModel: naming both.
        """
        if self.llm.price is None and budget is not None and budget.in_dollars:
            raise UnpricedModel(
                f"{self.llm.name!r} has no known price, and the budget {budget.name!r} is limited in dollars.",
                hint="Give the LLM a price (TokenPrice), or limit escalations or llm_tokens instead.",
            )

    def open(self, budget: Budget | None, *, threshold: float) -> EscalationDesk:
        """The desk for one generation, ``threshold`` being the selector's calibrated margin."""
        return EscalationDesk(self.llm, budget, self.margin if self.margin is not None else threshold)


class EscalationDesk:
    """One generation's escalations: knows what each would cost, holds it, asks, settles. A context manager."""

    def __init__(self, llm: LLMSelector, budget: Budget | None, margin: float) -> None:
        self._llm, self._budget, self.margin = llm, budget, margin
        self._session: LLMSession = llm.open()

    def __enter__(self) -> EscalationDesk:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._session.close()

    def wants(self, margin: float) -> bool:
        """Whether a selection this sure goes up."""
        return margin < self.margin

    def ask(self, ids: Sequence[int], candidates: Sequence[int]) -> tuple[list[float] | None, EscalationReport]:
        """Put the question, if the budget holds it.

        Args:
            ids: the prefix.
            candidates: ``[K]`` token ids.

        Returns:
            The candidates' log-probabilities (None: keep the local pick) and what happened.

        Raises:
            BudgetExceeded: only where the budget's ``on_exhausted`` is not "degrade".
        """
        started = time.perf_counter()
        wanted = self._charge(self._session.uncached(ids))
        try:
            hold = self._budget.reserve(_amount(wanted)) if self._budget else None
        except (BudgetExceeded, StoreUnavailable, UnpricedModel) as error:
            return None, self._refusal(error, started)
        scores: list[float] | None = None
        reason = ""
        try:
            scores = self._session.scores(ids, candidates)
        except S2TError as error:  # a dead LLM never takes the answer down
            reason = str(error)
        finally:  # also when the caller is cancelled while the LLM thinks
            if hold is not None:
                hold.settle(_amount(wanted)) if scores is not None else hold.release()
        spent = wanted if scores is not None else None
        outcome = "picked" if scores is not None else "failed"
        return scores, EscalationReport(outcome, wanted, spent, time.perf_counter() - started, reason)  # type: ignore[arg-type]

    def _charge(self, uncached: int) -> Charge:
        """The price of one escalation: uncached prefix in, one token out."""
        price = self._llm.price
        usd = price.cost(input_tokens=uncached, output_tokens=1) if price is not None else None
        return Charge(usd=usd, llm_tokens=uncached + 1)

    def _refusal(self, error: BudgetError | UnpricedModel, started: float) -> EscalationReport:
        if isinstance(error, BudgetExceeded) and self._budget is not None and self._budget.on_exhausted != "degrade":
            raise error
        return EscalationReport("refused", None, None, time.perf_counter() - started, str(error))


def _amount(charge: Charge) -> Amount:
    return Amount(usd=charge.usd, escalations=1, llm_tokens=charge.llm_tokens)
