"""Counts, cost and latency of one generation, for the message's metadata and the ledger's record."""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from functools import cached_property
from itertools import takewhile
from typing import Any

from ..budget import Budget, DevicePrice
from ..budget.charges import sum_of
from ..errors import StoreUnavailable
from ..ledger import Cost, GenerationRecord, Latency, Ledger, Receipt, Shadow, Thought
from ..telemetry import AnswerTelemetry
from ..types import EscalationRecord, EscalationReport, RefusedBy, Step
from .attribution import Caller
from .local_work import LocalWork
from .receipts import receipt, receipt_of
from .step_records import MS, recorded

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """Counts, cost and latency of one generation, without what an interrupted try of the same answer had counted.

    Attributes:
        refused: escalations that the budget refused, including one for which it raised.
        degraded: at least one emitted token was to be escalated and the LLM picked none.
        cost: USD.
        latency: milliseconds by part; ``total`` runs from the call to the moment this was computed.
        budget: its ``path``, and ``BudgetState.as_dict()``; None without a budget, or if its store cannot be reached.
        thought: the share of the reasoning in these numbers.
        shadow: what selector and LLM would have done; None outside shadow mode.
    """

    triggers: int
    selections: int
    flips: int
    escalations: int
    refused: int
    degraded: bool
    cost: Cost
    latency: Latency
    budget: dict[str, Any] | None
    thought: Thought
    shadow: Shadow | None


@dataclass
class Account:
    """Accumulates the steps of one generation.

    Attributes:
        prompt_tokens: number of prompt tokens.
        prompt: their ids, for ledgers that record text.
        device_price: of the SLM's device; None leaves the local cost unknown.
        ledger_error: why the ledger did not keep the record; None if it did, or without a ledger.
        thought_tokens: how many of the first steps are reasoning, its tags included.
        thinking: whether the next step is reasoning.
        shadow: whether every token is the SLM's own, whatever selector and LLM say.
        shortened: whether a call or JSON had to end for the token limit, so that texts in it may end early.
        telemetry: the answer's span; None without telemetry.
        work: what the answer takes from the budget; says which limit ended it.
    """

    model: str
    prompt_tokens: int
    caller: Caller
    llm: str | None = None
    device_price: DevicePrice | None = None
    budget: Budget | None = None
    shadow: bool = False
    telemetry: AnswerTelemetry | None = None
    work: LocalWork = field(default_factory=lambda: LocalWork(None))
    prompt: Sequence[int] = ()
    trace_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    steps: list[Step] = field(default_factory=list)
    thought_tokens: int = 0
    thinking: bool = False
    shortened: bool = False
    _start: float = field(default_factory=time.perf_counter)
    _first: float | None = None
    _last_escalation: EscalationRecord | None = None
    ledger_error: str | None = None

    def add(self, step: Step) -> None:
        """Count one step."""
        if self._first is None:
            self._first = time.perf_counter()
        self.steps.append(step)

    def record_escalation(self, question: EscalationRecord) -> None:
        """Keep the outcome of an escalation; its step may never be emitted."""
        self._last_escalation = question
        if self.telemetry is not None:
            self.telemetry.add_escalation(question, question.prefix_tokens - self.prompt_tokens)

    @property
    def unemitted_escalation(self) -> EscalationRecord | None:
        """The escalation whose step was never emitted, because the generation ended at it; None if all were."""
        last = self._last_escalation
        came = last is None or any(step.escalation is last.report for step in self.steps)
        return None if came else last

    @property
    def reports(self) -> list[EscalationReport]:
        """The report of every escalation of this try, in order."""
        last = self.unemitted_escalation
        return [*_reports(self.steps), *([last.report] if last else [])]

    @property
    def reused_tokens(self) -> int | None:
        """Prompt tokens whose KV came from the prefix cache; None where that is a server's, which does not say."""
        return self.steps[0].reused_tokens if self.steps else 0

    @property
    def replayed_tokens(self) -> int:
        """How many of the first tokens an interrupted try of this answer had generated, and counted."""
        same = (step.token_id == token for step, token in zip(self.steps, self.work.begun, strict=False))
        return sum(takewhile(bool, same))

    def count(self, true_of: Callable[[Step], bool]) -> int:
        """Number of steps that fulfil a predicate."""
        return sum(1 for step in self.steps if true_of(step))

    @cached_property
    def summary(self) -> Summary:
        """Computed at the first access, which must be after the last step, its text read."""
        became = Counter(report.outcome for report in self.reports)
        return Summary(
            triggers=self.count(lambda step: step.triggered),
            selections=self.count(_selected),
            flips=self.count(lambda step: step.flipped),
            escalations=became["picked"],
            refused=became["refused"],
            degraded=self.count(lambda step: step.escalation is not None and step.escalation.outcome != "picked") > 0,
            cost=self.cost,
            latency=self._latency(),
            budget=_budget_state(self.budget),
            thought=self._thought(),
            shadow=self._shadow() if self.shadow else None,
        )

    def metadata(self) -> dict[str, Any]:
        """The message's ``response_metadata["s2t"]``: counts in tokens, costs in USD, times in ms.

        The tokens are those of the whole message, everything else is of this try.
        """
        summary = self.summary
        return {
            "tokens": len(self.steps),
            "reused_tokens": self.reused_tokens,
            "trace_id": self.trace_id,
            "cost_usd": {part: _as_float(getattr(summary.cost, part)) for part in ("local", "llm", "total")},
            "latency_ms": {part: getattr(summary.latency, part) for part in _LATENCY_PARTS},
            "thought": {
                **summary.thought.model_dump(),
                "tokens": self.thought_tokens,
                "llm_usd": _as_float(summary.thought.llm_usd),
            },
            **{key: getattr(summary, key) for key in _SUMMARY_FIELDS},
            **({} if summary.shadow is None else {"shadow": summary.shadow.model_dump()}),
            **_stopped_entry(self.work.stopped_by),
            **({"shortened": True} if self.shortened else {}),
            **({} if self.ledger_error is None else {"ledger_error": self.ledger_error}),
        }

    def write_record(
        self,
        ledger: Ledger,
        record: Callable[[], GenerationRecord],
        *,
        decode: Callable[[int], str],
        prompt_text: Callable[[], str],
    ) -> None:
        """Write ``record`` to a ledger, with the steps that it keeps; a failure is kept in ``ledger_error``."""

        def made() -> GenerationRecord:
            return record().model_copy(update=recorded(ledger.recording, self.steps, decode, prompt_text))

        self.ledger_error = record_in_ledger(ledger, made)

    def record(self, finish_reason: str, *, decode: Callable[[int], str], error: str | None = None) -> GenerationRecord:
        """The ledger's record of the generation, with a receipt per escalation."""
        return GenerationRecord(
            agent=self.caller.agent,
            thread_id=self.caller.thread_id,
            run_id=self.caller.run_id,
            model=self.model,
            llm_model=self.llm,
            started_at=self.started_at,
            finish_reason=finish_reason,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=len(self.steps) - self.replayed_tokens,
            cost_usd=self.summary.cost,
            latency_ms=self.summary.latency,
            receipts=self._receipts(decode),
            error=error,
            trace_id=self.trace_id,
            thought=self.summary.thought,
            stopped_by=self.work.stopped_by,
            shadow=self.summary.shadow,
            shortened=self.shortened or None,
            **{key: getattr(self.summary, key) for key in _SUMMARY_FIELDS},
        )

    def _receipts(self, decode: Callable[[int], str]) -> tuple[Receipt, ...]:
        """One receipt per escalation, the last one perhaps without a step."""
        receipts = [receipt_of(step, decode) for step in self.steps if step.escalation]
        if self.unemitted_escalation is not None:
            at = self.unemitted_escalation.prefix_tokens - self.prompt_tokens
            receipts.append(receipt(self.unemitted_escalation, decode, step=at))
        return tuple(receipts)

    @property
    def cost(self) -> Cost:
        """USD of the steps so far; the local part is the device price times this generation's share of its forwards."""
        seconds = sum(step.timings.compute for step in self.steps)
        local = self.device_price.cost(seconds) if self.device_price else None
        return Cost(local=local, llm=_total_usd(self.reports))

    def _thought(self) -> Thought:
        steps = self.steps[self.replayed_tokens : self.thought_tokens]
        reports = _reports(steps)
        if self.unemitted_escalation is not None and self.thinking:
            reports.append(self.unemitted_escalation.report)
        return Thought(
            tokens=len(steps),
            triggers=sum(step.triggered for step in steps),
            selections=sum(map(_selected, steps)),
            escalations=sum(report.outcome == "picked" for report in reports),
            llm_usd=_total_usd(reports),
        )

    def _shadow(self) -> Shadow:
        picks = [(step.index, step.shadow) for step in self.steps if step.shadow is not None]
        flips = [index for index, pick in picks if pick.flipped]
        return Shadow(
            selections=sum(pick.picked_by in ("selector", "llm") for _, pick in picks),
            flips=len(flips),
            llm_flips=sum(pick.flipped and pick.picked_by == "llm" for _, pick in picks),
            first_flip=flips[0] if flips else None,
        )

    def _latency(self) -> Latency:
        by_verb = {
            verb: sum(getattr(step.timings, verb) for step in self.steps) * MS
            for verb in ("queue", "propose", "select", "escalate", "grammar")
        }
        if self.unemitted_escalation is not None:
            by_verb["escalate"] += self.unemitted_escalation.report.wait_s * MS
        ttft = (self._first - self._start) * MS if self._first is not None else None
        return Latency(ttft=ttft, total=(time.perf_counter() - self._start) * MS, **by_verb)


_LATENCY_PARTS = ("queue", "ttft", "propose", "grammar", "select", "escalate", "total")
_SUMMARY_FIELDS = ("triggers", "selections", "flips", "escalations", "refused", "degraded", "budget")


def _total_usd(reports: Sequence[EscalationReport]) -> Decimal | None:
    """USD of some escalations; None if the cost of one is unknown."""
    return sum_of(report.actual for report in reports if report.actual).usd


def _budget_state(budget: Budget | None) -> dict[str, Any] | None:
    """The budget's state; None, with a warning in the log, if its store cannot be reached."""
    if budget is None:
        return None
    try:
        state = budget.state()
        return {"path": state.path, **state.as_dict()}
    except StoreUnavailable as error:
        _log.warning("the answer comes without its budget: %s", error)
        return None


def _selected(step: Step) -> bool:
    """Whether selector or LLM picked the token, in this try."""
    return step.picked_by in ("selector", "llm") and not (step.escalation is not None and step.escalation.replayed)


def _reports(steps: Sequence[Step]) -> list[EscalationReport]:
    """The reports of some steps' escalations, without those of an earlier try."""
    return [step.escalation for step in steps if step.escalation is not None and not step.escalation.replayed]


def record_in_ledger(ledger: Ledger, record: Callable[[], GenerationRecord]) -> str | None:
    """Write a record to a ledger. An error does not raise; it is logged as a warning once per ledger and reason.

    Returns:
        The error as text; None if the record was written.
    """
    try:
        ledger.record(record())
    except Exception as error:  # noqa: BLE001 - a custom ledger may raise anything
        reason = f"{type(error).__name__}: {error}"
        logged: set[str] = vars(ledger).setdefault("_logged_reasons", set())
        level = logging.DEBUG if reason in logged or len(logged) >= MAX_LOGGED_REASONS else logging.WARNING
        if len(logged) < MAX_LOGGED_REASONS:
            logged.add(reason)
        _log.log(level, "the answer stands, but the ledger did not keep its record: %s", reason)
        return reason
    return None


MAX_LOGGED_REASONS = 100
"""Different reasons that are logged as warnings for one ledger."""


def _stopped_entry(limit: RefusedBy | None) -> dict[str, dict[str, Any]]:
    if limit is None:
        return {}
    shown = float(limit.limit) if isinstance(limit.limit, Decimal) else limit.limit
    return {"stopped_by": {"budget": limit.budget, "unit": limit.unit, "limit": shown}}


def _as_float(usd: Decimal | None) -> float | None:
    return None if usd is None else float(usd)
