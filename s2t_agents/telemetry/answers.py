"""One answer as a span, its questions to the LLM as spans below, and metrics of both (``Instruments``).

The API alone is used: spans and metrics go where the application's (or ``opentelemetry-instrument``'s) SDK sends them,
and nowhere without one.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from importlib import metadata
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ..ledger import GenerationRecord
from ..redaction import storable
from ..types import EscalationRecord, Sampling
from . import names

if TYPE_CHECKING:
    from opentelemetry.trace import Span

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)


def _never_raising(work: Callable[P, T]) -> Callable[P, T | None]:
    """Telemetry never takes an answer down: its errors are logged."""

    @wraps(work)
    def run(*args: P.args, **kwargs: P.kwargs) -> T | None:
        try:
            return work(*args, **kwargs)
        except Exception:  # noqa: BLE001 - an SDK's processors may raise anything
            _log.debug("an answer comes without its telemetry", exc_info=True)
            return None

    return run


@dataclass(frozen=True)
class AnswerRequest:
    """What an answer is asked for with.

    Attributes:
        operation: ``"chat"`` or ``"text_completion"``.
        model: the SLM.
        llm: the LLM of escalations; None without any.
        agent, thread_id: who asks.
        sampling: its parameters.
        stop: stop strings.
        streamed: whether its chunks are passed on as they come.
        structured: whether JSON is asked for.
        messages: the conversation as ``gen_ai.input.messages``; called only where content is recorded.
    """

    operation: str
    model: str
    llm: str | None
    agent: str
    thread_id: str | None
    sampling: Sampling
    stop: Sequence[str]
    streamed: bool
    structured: bool
    messages: Callable[[], list[dict[str, Any]]]

    def attributes(self) -> dict[str, Any]:
        """Of the span, known from the start."""
        sampling = self.sampling
        known = {
            names.OPERATION: self.operation,
            names.PROVIDER: names.PROVIDER_NAME,
            names.REQUEST_MODEL: self.model,
            names.LLM: self.llm,
            names.AGENT: self.agent,
            names.CONVERSATION: self.thread_id,
            names.MAX_TOKENS: sampling.max_tokens,
            names.TEMPERATURE: float(sampling.temperature),
            names.TOP_P: float(sampling.top_p) if sampling.temperature else None,
            names.SEED: sampling.seed,
            names.STOP_SEQUENCES: tuple(map(storable, self.stop)) or None,
            names.STREAM: self.streamed or None,
            names.OUTPUT_TYPE: "json" if self.structured else None,
        }
        return _known(known)


@_never_raising
def begin(request: AnswerRequest) -> AnswerTelemetry | None:
    """The telemetry of an answer that begins now, below the span that is current; None where nothing would come of it.

    That is without OpenTelemetry's API, and without an SDK behind it.
    """
    instruments = _instruments()
    if instruments is None:
        return None
    from opentelemetry import metrics
    from opentelemetry.trace import SpanKind

    name = storable(f"{request.operation} {request.model}")
    span = instruments.tracer.start_span(name, kind=SpanKind.INTERNAL, attributes=request.attributes())
    metered = not type(metrics.get_meter_provider()).__module__.startswith("opentelemetry.metrics")  # the API's own
    return AnswerTelemetry(request, span, instruments) if metered or span.is_recording() else None


class AnswerTelemetry:
    """The span of one answer until it ends."""

    def __init__(self, request: AnswerRequest, span: Span, instruments: Instruments) -> None:
        self._request, self._span, self._instruments = request, span, instruments

    @_never_raising
    def add_escalation(self, question: EscalationRecord, step: int) -> None:
        """A question to the LLM that is over: a span that ends now, or an event where the budget refused it."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        report, llm = question.report, self._request.llm or ""
        told = {
            names.ESCALATION_STEP: step,
            names.ESCALATION_OUTCOME: report.outcome,
            names.ESCALATION_CANDIDATES: len(question.candidates),
        }
        self._instruments.escalations.add(1, _known({**self._counted(), names.ESCALATION_OUTCOME: report.outcome}))
        if report.outcome == "refused":
            by = report.refused_by
            limit = (
                {names.BUDGET: by.budget, names.BUDGET_UNIT: by.unit, names.BUDGET_LIMIT: float(by.limit)} if by else {}
            )
            self._span.add_event(names.REFUSED_EVENT, _known({**told, **limit}))
            return
        now = time.time_ns()
        span = self._instruments.tracer.start_span(
            storable(f"chat {llm}"),
            context=set_span_in_context(self._span),
            kind=SpanKind.CLIENT,
            start_time=now - int(report.wait_s * 1e9),
            attributes={
                names.OPERATION: "chat",
                names.PROVIDER: names.PROVIDER_NAME,
                names.REQUEST_MODEL: storable(llm),
            },
        )
        paid = report.actual
        usd = None if paid is None or paid.usd is None else float(paid.usd)
        tokens = None if paid is None else paid.llm_tokens
        span.set_attributes(_known({**told, names.ESCALATION_TOKENS: tokens, names.ESCALATION_USD: usd}))
        if report.outcome != "picked":
            span.set_attribute(names.ERROR_TYPE, report.outcome)
            span.set_status(Status(StatusCode.ERROR, report.outcome))
        span.end(now)

    @_never_raising
    def end(
        self,
        record: Callable[[], GenerationRecord],
        *,
        reused_tokens: int | None,
        budget: str | None,
        error: BaseException | None,
        output: Callable[[], list[dict[str, Any]]],
    ) -> None:
        """End the span and count the answer.

        Args:
            record: the ledger's record of it.
            reused_tokens: of the prompt, from the prefix cache; None where that is not known.
            budget: path of its budget; None had none.
            error: what ended it.
            output: the answer as ``gen_ai.output.messages``; called only where content is recorded.
        """
        try:
            self._count(kept := record(), budget, error)
            if self._span.is_recording():
                self._describe(kept, reused_tokens, budget, error)
                if os.environ.get(names.CAPTURE_CONTENT, "").strip().lower() in names.CAPTURING:
                    self._span.set_attribute(names.INPUT_MESSAGES, _json(self._request.messages()))
                    self._span.set_attribute(names.OUTPUT_MESSAGES, _json(output()))
        finally:
            self._span.end()

    def _describe(
        self, record: GenerationRecord, reused_tokens: int | None, budget: str | None, error: BaseException | None
    ) -> None:
        from opentelemetry.trace import Status, StatusCode

        cost, by, ttft = record.cost_usd, record.stopped_by, record.latency_ms.ttft
        told: dict[str, Any] = {
            names.RESPONSE_MODEL: record.model,
            names.RESPONSE_ID: record.trace_id,
            names.FINISH_REASONS: (record.finish_reason,),
            names.TIME_TO_FIRST_CHUNK: ttft / 1000 if self._request.streamed and ttft is not None else None,
            names.INPUT_TOKENS: record.prompt_tokens,
            names.OUTPUT_TOKENS: record.completion_tokens,
            names.CACHED_TOKENS: reused_tokens,
            names.REASONING_TOKENS: record.thought.tokens or None,
            names.COST: None if cost.total is None else float(cost.total),
            names.COST_LOCAL: None if cost.local is None else float(cost.local),
            names.COST_LLM: None if cost.llm is None else float(cost.llm),
            names.TRIGGERS: record.triggers,
            names.SELECTIONS: record.selections,
            names.FLIPS: record.flips,
            names.ESCALATIONS: record.escalations,
            names.REFUSED: record.refused,
            names.DEGRADED: record.degraded,
            names.SHADOW_FLIPS: record.shadow.flips if record.shadow is not None else None,
            names.BUDGET: budget,
            names.STOPPED_BY_BUDGET: by.budget if by else None,
            names.STOPPED_BY_UNIT: by.unit if by else None,
        }
        for part, name in (("limit", names.BUDGET_LIMIT), ("spent", names.BUDGET_SPENT), ("left", names.BUDGET_LEFT)):
            told |= {f"{name}.{unit}": value for unit, value in _figures(record, part).items()}
        self._span.set_attributes(_known(told))
        if error is not None:
            self._span.set_attribute(names.ERROR_TYPE, type(error).__name__)
            self._span.set_status(Status(StatusCode.ERROR, type(error).__name__))  # a message may hold content

    def _count(self, record: GenerationRecord, budget: str | None, error: BaseException | None) -> None:
        at, ours, made = self._conventional(record), self._counted(), self._instruments
        for kind, tokens in (("input", record.prompt_tokens), ("output", record.completion_tokens)):
            made.tokens.record(tokens, {**at, names.TOKEN_TYPE: kind})
        failed = {names.ERROR_TYPE: type(error).__name__} if error is not None else {}
        if record.latency_ms.total is not None:
            made.duration.record(record.latency_ms.total / 1000, {**at, **failed})
        if self._request.streamed and record.latency_ms.ttft is not None:
            made.first_chunk.record(record.latency_ms.ttft / 1000, at)
        made.triggers.add(record.triggers, ours)
        made.flips.add(record.flips, ours)
        for part, usd in (("local", record.cost_usd.local), ("llm", record.cost_usd.llm)):
            if usd is not None:  # unknown is not 0
                made.cost.add(float(usd), {**ours, names.COST_PART: part})
        for unit, left in _figures(record, "left").items() if budget is not None else ():
            made.left.set(left, {names.BUDGET: storable(budget or ""), names.BUDGET_UNIT: unit})

    def _conventional(self, record: GenerationRecord) -> dict[str, Any]:
        return {
            names.OPERATION: self._request.operation,
            names.PROVIDER: names.PROVIDER_NAME,
            names.REQUEST_MODEL: storable(self._request.model),
            names.RESPONSE_MODEL: record.model,
        }

    def _counted(self) -> dict[str, Any]:
        return {names.REQUEST_MODEL: storable(self._request.model), names.AGENT: storable(self._request.agent)}


class Instruments:
    """The tracer and the instruments, which follow whatever SDK the application sets up, also later."""

    def __init__(self) -> None:
        from opentelemetry import metrics, trace

        version = metadata.version("s2t-agents")
        self.tracer = trace.get_tracer(names.SCOPE, version)
        meter = metrics.get_meter(names.SCOPE, version)

        def histogram(named: tuple[str, str, str], buckets: Sequence[float]) -> Any:
            name, unit, text = named
            return meter.create_histogram(name, unit, text, explicit_bucket_boundaries_advisory=list(buckets))

        self.tokens = histogram(names.TOKEN_USAGE, names.TOKEN_BUCKETS)
        self.duration = histogram(names.DURATION, names.SECONDS_BUCKETS)
        self.first_chunk = histogram(names.FIRST_CHUNK, names.SECONDS_BUCKETS)
        self.triggers = meter.create_counter(*names.COUNT_TRIGGERS)
        self.flips = meter.create_counter(*names.COUNT_FLIPS)
        self.escalations = meter.create_counter(*names.COUNT_ESCALATIONS)
        self.cost = meter.create_counter(*names.COUNT_COST)
        self.left = meter.create_gauge(*names.LEFT)


@cache
def _instruments() -> Instruments | None:
    try:
        return Instruments()
    except ImportError:
        return None


def _figures(record: GenerationRecord, part: str) -> dict[str, float]:
    """What of a budget's state is known, in its units."""
    found = (record.budget or {}).get(part)
    if not isinstance(found, Mapping):
        return {}
    return {str(unit): float(value) for unit, value in found.items() if value is not None}


def _known(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes that have a value; texts as every exporter takes them."""
    return {
        name: storable(value) if isinstance(value, str) else value
        for name, value in attributes.items()
        if value is not None
    }


def _json(value: Any) -> str:
    return storable(json.dumps(value, ensure_ascii=False, default=str))
