"""What one generation did, what it cost and why: a record, with a receipt for every question to the LLM.

Plain frozen data. As JSON, dollars are strings (exact) and infinite scores the strings "Infinity" / "-Infinity".
"""

from __future__ import annotations

import math
import re
import uuid
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    computed_field,
    model_serializer,
)
from pydantic import model_validator as whole

from ..budget import money
from ..budget.quantities import quantities_of
from ..redaction import storable
from ..types import Charge, Outcome, Picker, RefusedBy

WholeNumber = Annotated[int, Field(ge=0, le=money.MAX_COUNT)]
MAX_EXPONENT = 30
"""Decimal places of a limit, on either side of the point."""
Millis = Annotated[float, Field(ge=0, le=money.MAX_COUNT, allow_inf_nan=False)]


_AS_WRITTEN = re.compile(r"(0|[1-9]\d{0,5})(\.\d{0,11}[1-9])?", re.ASCII)
"""Dollars as records hold them already, read without further checks: a report reads millions."""


def _exact_dollars(value: Any, *, most: Decimal = money.MAX_USD) -> Any:
    if value is None:
        return None
    if isinstance(value, str) and _AS_WRITTEN.fullmatch(value):
        return Decimal(value)
    amount = money.dollars(value, "cost in USD")
    if amount > most:
        raise ValueError(f"cost in USD: {value!r:.40} is above {most:,}")
    return money.round_usd(amount)


def _utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError(f"{moment} is not a time that can be given in UTC") from None


def _digits(usd: Decimal | None) -> str | None:
    return None if usd is None else f"{usd:f}"


def _countable(charge: Charge | None) -> Charge | None:
    """The charge, in exact dollars; no record may hold one that no budget can count."""
    if charge is None:
        return None
    quantities_of(charge)
    if isinstance(charge.usd, Decimal | None):
        return charge
    return replace(charge, usd=money.dollars(charge.usd, "Charge.usd"))


def _charge_json(charge: Charge | None) -> dict[str, Any] | None:
    if charge is None:
        return None
    return {"usd": _digits(charge.usd), "escalations": charge.escalations, "llm_tokens": charge.llm_tokens}


def _limit_json(refused_by: RefusedBy | None) -> dict[str, Any] | None:
    if refused_by is None:
        return None
    limit = refused_by.limit
    shown = _digits(limit) if isinstance(limit, Decimal) else limit
    return {"budget": refused_by.budget, "unit": refused_by.unit, "limit": shown}


def _finite_limit(refused_by: RefusedBy | None) -> RefusedBy | None:
    """The limit, which is a number that can be written out in digits."""
    limit = Decimal(0 if refused_by is None else refused_by.limit)
    if not limit.is_finite() or abs(limit.adjusted()) > MAX_EXPONENT:
        raise ValueError(f"limit: {limit!s:.40} is no number that a budget has")
    return refused_by


def _finite_state(budget: dict[str, Any] | None) -> dict[str, Any] | None:
    """A budget's state, of which every number is finite and the path, where it has one, a text."""
    if budget is not None:
        if not isinstance(budget.get("path"), str | None):
            raise ValueError("the path of the budget is no text")
        _check_finite(budget)
    return budget


def _check_finite(value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"budget: {value} is no number that a budget has")
    if isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            _check_finite(each)


Text = Annotated[str, AfterValidator(storable)]
"""Lone surrogates, which no file takes, as their escapes."""
DIGITS = PlainSerializer(_digits, when_used="json")
Usd = Annotated[Decimal | None, BeforeValidator(_exact_dollars), DIGITS]
Booked = Annotated[Charge | None, AfterValidator(_countable), PlainSerializer(_charge_json, when_used="json")]
Refuser = Annotated[RefusedBy | None, AfterValidator(_finite_limit), PlainSerializer(_limit_json, when_used="json")]
BudgetJson = Annotated[dict[str, Any] | None, AfterValidator(_finite_state)]
Utc = Annotated[AwareDatetime, AfterValidator(_utc)]


class Frozen(BaseModel):
    """Immutable, closed to unknown fields, exact in JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings", protected_namespaces=())


class ReceiptCandidate(Frozen):
    """One token the LLM was asked about, with every score known for it (log-probabilities; None: not scored).

    Args:
        token_id: id in the SLM's vocabulary.
        text: the token as text.
        slm: the base model's score.
        selector: the local selector's score.
        llm: the LLM's score; None from a judge, which only names one.
    """

    token_id: int
    text: Text = ""
    slm: float | None = None
    selector: float | None = None
    llm: float | None = None


class Receipt(Frozen):
    """One escalation: asked and answered, refused by the budget, failed, or interrupted.

    Args:
        step: position in the answer, in tokens.
        prefix_tokens: tokens the LLM had to read.
        candidates: what it chose among.
        wanted: the token the base model would have taken; None if unknown.
        pick: the token that was taken; None if unknown, or if none was: the answer ended here.
        would_pick: in shadow mode, where ``pick`` is the base model's, the token that would have been taken.
        outcome: ``"picked"``, ``"refused"``, ``"failed"`` or ``"interrupted"``.
        reserved: what was (or, if refused, would have been) set aside.
        actual: what was settled; None if nothing was spent or it is unknown.
        refused_by: the limit that refused; None where none did, the budget could not be reached, or it was not noted.
        wait_ms: time the answer stood still for it, in ms.
        reason: why it was refused, failed or was interrupted, or why it was asked. A pick that an earlier try of the
            answer had paid for says so here, and its ``actual`` is nothing, not even an escalation.
    """

    step: WholeNumber
    prefix_tokens: WholeNumber
    candidates: tuple[ReceiptCandidate, ...] = ()
    wanted: int | None = None
    pick: int | None = None
    outcome: Outcome
    reserved: Booked = None
    actual: Booked = None
    refused_by: Refuser = None
    wait_ms: Millis = 0.0
    reason: Text = ""
    would_pick: int | None = None

    @model_serializer(mode="wrap")
    def _without_shadow(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if value is not None or name != "would_pick"}

    def local_pick(self) -> int | None:
        """The token that would stand without the LLM: the selector's best where it scored all, else the base's."""
        scored = [(candidate.selector, candidate.token_id) for candidate in self.candidates]
        known = [(score, token) for score, token in scored if score is not None]
        if known and len(known) == len(scored):
            return max(known, key=lambda pair: pair[0])[1]
        return self.wanted


class Cost(Frozen):
    """USD of one generation. ``None`` is unknown, and makes the total unknown; free is 0.

    Args:
        local: the small model's compute.
        llm: everything asked of the LLM, failed and aborted calls too.
    """

    local: Usd = None
    llm: Usd = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def total(self) -> Usd:
        """local + llm, or None if either is unknown."""
        return None if self.local is None or self.llm is None else money.add(self.local, self.llm)

    @whole(mode="before")
    @classmethod
    def _total_agrees(cls, data: Any) -> Any:
        """A given total may only repeat the sum."""
        if not isinstance(data, dict) or "total" not in data:
            return data
        parts = {key: value for key, value in data.items() if key != "total"}
        local, llm = (_exact_dollars(parts.get(k)) for k in ("local", "llm"))
        known = None if local is None or llm is None else money.add(local, llm)
        total = _exact_dollars(data["total"], most=2 * money.MAX_USD)
        if total != known:
            raise ValueError(f"total {total} is not local {local} + llm {llm} ({known})")
        return parts


class Latency(Frozen):
    """Where the time of one generation went, in ms; None where it was not measured.

    Args:
        queue: waiting to be admitted.
        ttft: from the call to the first token.
        propose: base model forwards.
        select: local selector.
        escalate: waiting for the LLM.
        grammar: masks.
        total: from the call to the last token.
    """

    queue: Millis | None = None
    ttft: Millis | None = None
    propose: Millis | None = None
    select: Millis | None = None
    escalate: Millis | None = None
    grammar: Millis | None = None
    total: Millis | None = None


class Thought(Frozen):
    """What of a generation went into the thought before its answer.

    Args:
        tokens: of the thought, its tags included; they are part of ``completion_tokens``.
        triggers, selections, escalations: as the generation's own, of which they are part.
        llm_usd: what its questions to the LLM cost, part of ``cost_usd.llm``; None is unknown.
    """

    tokens: WholeNumber = 0
    triggers: WholeNumber = 0
    selections: WholeNumber = 0
    escalations: WholeNumber = 0
    llm_usd: Usd = Decimal(0)


class Shadow(Frozen):
    """What selector and LLM would have done to an answer in shadow mode.

    After the first flip the answer would have gone another way: from there on the figures are an approximation.

    Args:
        selections: tokens that they would have decided.
        flips: of those, how many would have been others than the base model's best.
        llm_flips: of the flips, those by the LLM.
        first_flip: position of the first, in tokens; None if there is none: the answer would have been the same.
    """

    selections: WholeNumber = 0
    flips: WholeNumber = 0
    llm_flips: WholeNumber = 0
    first_flip: WholeNumber | None = None


class StepTimes(Frozen):
    """Where the time of one step went, in ms; None where nothing was done."""

    propose: Millis | None = None
    grammar: Millis | None = None
    select: Millis | None = None
    escalate: Millis | None = None


class StepRecord(Frozen):
    """One step, where a ledger's ``Recording`` asks for steps. Its JSON leaves out what is as it mostly is.

    Args:
        token: the token that was taken.
        by: who picked it.
        text: the token as text; None where text is not recorded.
        wanted: the token that the base model would have taken, where it is another.
        shadow, shadow_by: in shadow mode, the token that would have been taken instead, and by whom.
        triggered: whether the trigger fired.
        entropy: in nats; None where the base model was not asked, as for a forced token.
        candidates: at critical steps, the base model's best first; without text where that is not recorded.
        ms: where the time went.
    """

    token: int
    by: Picker
    text: Text | None = None
    wanted: int | None = None
    shadow: int | None = None
    shadow_by: Picker | None = None
    triggered: bool = False
    entropy: Annotated[float, Field(allow_inf_nan=False)] | None = None
    candidates: tuple[ReceiptCandidate, ...] = ()
    ms: StepTimes = StepTimes()

    @model_serializer(mode="wrap")
    def _without_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        return {name: value for name, value in dump(self).items() if getattr(self, name) != fields[name].default}


class GenerationRecord(Frozen):
    """One generation. Every field that needs a unit: tokens, USD, ms, UTC.

    One that resumes an interrupted answer counts what it did itself: ``completion_tokens`` are its own, while ``steps``
    and ``receipts`` begin with those of the earlier tries.

    ``steps`` and ``prompt`` (the end of it, as text) are None where the ledger's ``Recording`` does not ask for them,
    ``stopped_by`` where no limit of the budget ended the answer, ``shadow`` outside shadow mode, ``shortened`` where no
    call and no JSON had to end for the answer's token limit; a record without them
    is written as before there were any.

    Raises:
        pydantic.ValidationError: negative counts, a moment without a time zone, a cached answer that cost something, an
            entropy or a number of a budget that is not finite.
    """

    id: Text = Field(default_factory=lambda: uuid.uuid4().hex, min_length=1)
    agent: Text = "default"
    thread_id: Text | None = None
    run_id: Text | None = None
    model: Text = ""
    llm_model: Text | None = None
    started_at: Utc = Field(default_factory=lambda: datetime.now(UTC))
    finish_reason: Text = ""
    prompt_tokens: WholeNumber = 0
    completion_tokens: WholeNumber = 0
    triggers: WholeNumber = 0
    selections: WholeNumber = 0
    flips: WholeNumber = 0
    escalations: WholeNumber = 0
    refused: WholeNumber = 0
    degraded: bool = False
    cached: bool = False
    cost_usd: Cost = Cost()
    latency_ms: Latency = Latency()
    budget: BudgetJson = None
    receipts: tuple[Receipt, ...] = ()
    error: Text | None = None
    trace_id: Text | None = None
    thought: Thought = Thought()
    steps: tuple[StepRecord, ...] | None = None
    prompt: Text | None = None
    stopped_by: Refuser = None
    shadow: Shadow | None = None
    shortened: bool | None = None

    @model_serializer(mode="wrap")
    def _without_what_is_not_recorded(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if value is not None or name not in _RECORDED}

    @whole(mode="after")
    def _cached_is_free(self) -> Self:
        if self.cached and (self.cost_usd.local or self.cost_usd.llm):
            raise ValueError("an answer from the cache costs nothing")
        return self


_RECORDED = ("steps", "prompt", "stopped_by", "shadow", "shortened")


class SummedReceipt(BaseModel):
    """What sums need of a receipt; the rest is stepped over."""

    model_config = ConfigDict(frozen=True)

    outcome: Outcome


class SummedRecord(GenerationRecord):
    """A record without what no sum needs, which is most of it and takes most of the time to read."""

    receipts: tuple[SummedReceipt, ...] = ()  # type: ignore[assignment]
    steps: Annotated[None, BeforeValidator(lambda steps: None)] = None
