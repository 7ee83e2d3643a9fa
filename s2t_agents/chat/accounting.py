"""From steps to numbers: what one generation did, cost and took, for the message and for the ledger."""

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
from typing import Any

from langchain_core.messages import AIMessage

from ..budget import Budget, DevicePrice
from ..errors import StoreUnavailable
from ..ledger import Cost, GenerationRecord, Latency, Ledger, Receipt, ReceiptCandidate, Thought
from ..types import Asked, Charge, EscalationReport, Step
from .attribution import Caller, current_caller

MS = 1000.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """What one generation did, cost and took, for the message and for the ledger alike.

    Attributes:
        refused: escalations that the budget refused, also where it raised.
        degraded: an LLM was wanted for a token that came, and not heard.
        cost: USD.
        latency: milliseconds by part; ``total`` runs from the call to the moment this was taken.
        budget: as ``BudgetState.as_dict()``; None without a budget, or when its store cannot be reached.
        thought: the part of all this that went into the thought before the answer.
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


@dataclass
class Account:
    """Adds up the steps of one generation as they come.

    Attributes:
        prompt_tokens: read before the first step.
        device_price: of the SLM's device; None leaves the local cost unknown.
        ledger_error: why the ledger did not keep the record; None where it did, or there is no ledger.
        thought_tokens: how many of the first steps are a thought, its tags included.
        thinking: whether the next step belongs to it.
    """

    model: str
    prompt_tokens: int
    caller: Caller
    llm: str | None = None
    device_price: DevicePrice | None = None
    budget: Budget | None = None
    trace_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    steps: list[Step] = field(default_factory=list)
    thought_tokens: int = 0
    thinking: bool = False
    _start: float = field(default_factory=time.perf_counter)
    _first: float | None = None
    _last_asked: Asked | None = None
    ledger_error: str | None = None

    def add(self, step: Step) -> None:
        """Count one step."""
        if self._first is None:
            self._first = time.perf_counter()
        self.steps.append(step)

    def asked(self, question: Asked) -> None:
        """Keep what became of a question: its step may never come."""
        self._last_asked = question

    @property
    def stepless(self) -> Asked | None:
        """The question whose step never came: the generation ended while, or because, the LLM was to be asked."""
        last = self._last_asked
        came = last is None or any(step.escalation is last.report for step in self.steps)
        return None if came else last

    @property
    def reports(self) -> list[EscalationReport]:
        """What became of every question, in their order."""
        last = self.stepless
        return [*(step.escalation for step in self.steps if step.escalation), *([last.report] if last else [])]

    @property
    def reused_tokens(self) -> int:
        """Prompt tokens whose KV an earlier turn had left."""
        return sum(step.reused_tokens for step in self.steps)

    def count(self, true_of: Callable[[Step], bool]) -> int:
        """Steps of which something is true."""
        return sum(1 for step in self.steps if true_of(step))

    @cached_property
    def summary(self) -> Summary:
        """Taken when first asked for, which must be after the last step, and the same from then on."""
        became = Counter(report.outcome for report in self.reports if not report.replayed)
        return Summary(
            triggers=self.count(lambda step: step.triggered),
            selections=self.count(lambda step: step.picked_by in ("selector", "llm")),
            flips=self.count(lambda step: step.flipped),
            escalations=became["picked"],
            refused=became["refused"],
            degraded=self.count(lambda step: step.escalation is not None and step.picked_by != "llm") > 0,
            cost=self._cost(),
            latency=self._latency(),
            budget=_state(self.budget),
            thought=self._thought(),
        )

    def metadata(self) -> dict[str, Any]:
        """The ``response_metadata["s2t"]`` of the message. Counts in tokens, money in USD, times in ms."""
        summary = self.summary
        return {
            "tokens": len(self.steps),
            "reused_tokens": self.reused_tokens,
            "trace_id": self.trace_id,
            "cost_usd": {part: _number(getattr(summary.cost, part)) for part in ("local", "llm", "total")},
            "latency_ms": {part: getattr(summary.latency, part) for part in _TOLD},
            "thought": {**summary.thought.model_dump(), "llm_usd": _number(summary.thought.llm_usd)},
            **{key: getattr(summary, key) for key in _SHARED},
            **_mark(self.ledger_error),
        }

    def keep(
        self, ledger: Ledger, finish_reason: str, *, decode: Callable[[int], str], error: str | None = None
    ) -> None:
        """Give the record to a ledger; where it cannot be kept, the answer says so and stands."""
        self.ledger_error = keep(ledger, lambda: self.record(finish_reason, decode=decode, error=error))

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
            completion_tokens=len(self.steps),
            cost_usd=self.summary.cost,
            latency_ms=self.summary.latency,
            receipts=self._receipts(decode),
            error=error,
            trace_id=self.trace_id,
            thought=self.summary.thought,
            **{key: getattr(self.summary, key) for key in _SHARED},
        )

    def _receipts(self, decode: Callable[[int], str]) -> tuple[Receipt, ...]:
        """One for every question, the last perhaps without a step."""
        receipts = [receipt(step, decode) for step in self.steps if step.escalation]
        if self.stepless is not None:
            at = self.stepless.prefix_tokens - self.prompt_tokens
            receipts.append(_receipt(self.stepless, decode, step=at))
        return tuple(receipts)

    def _cost(self) -> Cost:
        """The local part prices the answer's share of the forwards that it took part in, in device-seconds."""
        seconds = sum(step.timings.compute for step in self.steps)
        local = self.device_price.cost(seconds) if self.device_price else None
        return Cost(local=local, llm=_spent(self.reports))

    def _thought(self) -> Thought:
        steps = self.steps[: self.thought_tokens]
        reports = [step.escalation for step in steps if step.escalation]
        if self.stepless is not None and self.thinking:
            reports.append(self.stepless.report)
        return Thought(
            tokens=len(steps),
            triggers=sum(step.triggered for step in steps),
            selections=sum(step.picked_by in ("selector", "llm") for step in steps),
            escalations=sum(report.outcome == "picked" for report in reports),
            llm_usd=_spent(reports),
        )

    def _latency(self) -> Latency:
        by_verb = {
            verb: sum(getattr(step.timings, verb) for step in self.steps) * MS
            for verb in ("queue", "propose", "select", "escalate", "grammar")
        }
        if self.stepless is not None:
            by_verb["escalate"] += self.stepless.report.wait_s * MS
        ttft = (self._first - self._start) * MS if self._first is not None else None
        return Latency(ttft=ttft, total=(time.perf_counter() - self._start) * MS, **by_verb)


_TOLD = ("queue", "ttft", "propose", "select", "escalate", "total")
_SHARED = ("triggers", "selections", "flips", "escalations", "refused", "degraded", "budget")


def _spent(reports: Sequence[EscalationReport]) -> Decimal | None:
    """USD of some questions to the LLM; None where one has an unknown cost."""
    charges = [report.actual for report in reports if report.actual]
    known = [charge.usd for charge in charges if charge.usd is not None]
    return sum(known, Decimal(0)) if len(known) == len(charges) else None


def _state(budget: Budget | None) -> dict[str, Any] | None:
    """None when the store cannot be reached: the answer and its record are worth more than the figures."""
    if budget is None:
        return None
    try:
        return budget.state().as_dict()
    except StoreUnavailable as error:
        _log.warning("the answer comes without its budget: %s", error)
        return None


def receipt(step: Step, decode: Callable[[int], str]) -> Receipt:
    """The ledger's receipt of a step's escalation."""
    assert step.escalation is not None
    question = Asked(step.prefix_tokens, step.candidates, step.escalation)
    return _receipt(question, decode, step=step.index, wanted=step.wanted_id, pick=step.token_id)


def _receipt(
    question: Asked, decode: Callable[[int], str], *, step: int, wanted: int | None = None, pick: int | None = None
) -> Receipt:
    report = question.report
    return Receipt(
        step=step,
        prefix_tokens=question.prefix_tokens,
        candidates=tuple(
            ReceiptCandidate(token_id=c.token_id, text=decode(c.token_id), slm=c.slm, selector=c.selector, llm=c.llm)
            for c in question.candidates
        ),
        wanted=wanted,
        pick=pick,
        outcome=report.outcome,
        reserved=report.reserved,
        actual=Charge(Decimal(0), escalations=0) if report.replayed else report.actual,
        refused_by=report.refused_by,
        wait_ms=report.wait_s * MS,
        reason=report.reason,
    )


def keep(ledger: Ledger, record: Callable[[], GenerationRecord]) -> str | None:
    """Give a ledger a record: what goes wrong is logged, once for each ledger and reason, and costs no answer.

    Returns:
        What went wrong; None where the record is kept.
    """
    try:
        ledger.record(record())
    except Exception as error:  # noqa: BLE001 - a ledger of the caller's own may raise anything
        said = f"{type(error).__name__}: {error}"
        told: set[str] = vars(ledger).setdefault("_told", set())
        level = logging.DEBUG if said in told or len(told) >= REASONS_TOLD else logging.WARNING
        if len(told) < REASONS_TOLD:
            told.add(said)
        _log.log(level, "the answer stands, but the ledger did not keep its record: %s", said)
        return said
    return None


REASONS_TOLD = 100
"""Different reasons that are logged for one ledger."""


def _mark(ledger_error: str | None) -> dict[str, str]:
    return {} if ledger_error is None else {"ledger_error": ledger_error}


def _number(usd: Decimal | None) -> float | None:
    return None if usd is None else float(usd)


def from_cache(message: AIMessage, ledger: Ledger | None) -> AIMessage:
    """An answer out of LangChain's cache: it cost nothing this time, and says so, in the ledger too.

    It touched no budget: that of the call which made it is nobody else's business. ``degraded`` is true of its text.

    Args:
        message: as the cache holds it; its metadata tell of the call that made it.
        ledger: takes a record with ``cached=True``.
    """
    told = message.response_metadata.get("s2t")
    if told is None:
        return message
    idle: dict[str, Any] = dict.fromkeys(("triggers", "selections", "flips", "escalations", "refused"), 0)
    free = {key: dict.fromkeys(told[key], 0.0) for key in ("cost_usd", "latency_ms")}
    failed = keep(ledger, lambda: _cached_record(message, current_caller())) if ledger is not None else None
    told = {key: value for key, value in told.items() if key != "ledger_error"}  # of the call that made it
    if "thought" in told:
        idle["thought"] = {**dict.fromkeys(told["thought"], 0), "tokens": told["thought"]["tokens"], "llm_usd": 0.0}
    metadata = {**message.response_metadata, "s2t": {**told, **idle, **free, "budget": None, **_mark(failed)}}
    return message.model_copy(update={"response_metadata": metadata})


def _cached_record(message: AIMessage, caller: Caller) -> GenerationRecord:
    usage, said = message.usage_metadata, message.response_metadata
    return GenerationRecord(
        agent=caller.agent,
        thread_id=caller.thread_id,
        run_id=caller.run_id,
        model=str(said.get("model_name", "")),
        finish_reason=str(said.get("finish_reason", "")),
        prompt_tokens=usage["input_tokens"] if usage else 0,
        completion_tokens=usage["output_tokens"] if usage else 0,
        degraded=said["s2t"]["degraded"],
        cached=True,
        cost_usd=Cost(local=Decimal(0), llm=Decimal(0)),
        thought=Thought(tokens=said["s2t"].get("thought", {}).get("tokens", 0)),
        trace_id=said["s2t"]["trace_id"],
    )
