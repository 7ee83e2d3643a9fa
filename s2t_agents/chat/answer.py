"""An answer from a prepared request: who pays for it, the engine's steps, and their text, in one ``Generation``."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

from ..budget import Budget, DevicePrice
from ..engine.engine import Engine
from ..ledger import Ledger
from ..llms.question import Conversation
from ..scheduling.admission import AdmissionTicket
from ..telemetry import AnswerRequest
from ..types import Sampling, Step
from .accounting import Account
from .attribution import Caller
from .generation import Generation, GenerationRequest
from .local_work import LocalWork

Steps = Generator[AdmissionTicket | Step, None, None]


@dataclass(frozen=True)
class AnswerContext:
    """Who pays for an answer, and who hears of it.

    Attributes:
        caller: whose it is in the ledger.
        work: what is reserved of the budget for it.
        budget: limits its escalations.
        cache_scope: the prefix cache is shared within it.
        device_price: of the SLM's device.
        ledger: receives its record.
        on_step: called with its trace id and every step.
    """

    caller: Caller
    work: LocalWork
    budget: Budget | None
    cache_scope: str | None
    device_price: DevicePrice | None
    ledger: Ledger | None
    on_step: Callable[[str, Step], None] | None


def begin_answer(
    engine: Engine,
    request: GenerationRequest,
    sampling: Sampling,
    context: AnswerContext,
    *,
    operation: str,
    streamed: bool,
    messages: Callable[[], list[dict[str, Any]]],
    conversation: Conversation | None = None,
    recording: Callable[[Steps, Account], Steps] | None = None,
) -> Generation:
    """The generation of one answer; the model does not run yet.

    Args:
        engine: makes its steps.
        request: what is generated.
        sampling: how its tokens are drawn; ``request.room`` limits them.
        context: who pays, and who hears of it.
        operation: OpenTelemetry's name of it.
        streamed: whether its chunks are passed on as they come.
        messages: the conversation, for telemetry that records content.
        conversation: what the prompt was made of, for an LLM with another tokenizer.
        recording: passes the steps on and keeps them for a next try.
    """
    work, on_step = context.work, context.on_step
    account = Account(
        model=engine.slm.name,
        prompt_tokens=len(request.prompt),
        prompt=request.prompt,
        caller=context.caller,
        llm=engine.escalation.llm.name if engine.escalation else None,
        device_price=context.device_price,
        budget=context.budget,
        work=work,
        shadow=engine.shadow,
    )
    sampling = replace(sampling, max_tokens=request.room)
    asked = AnswerRequest(
        operation=operation,
        model=account.model,
        llm=account.llm,
        agent=account.caller.agent,
        thread_id=account.caller.thread_id,
        sampling=sampling,
        stop=request.stop,
        streamed=streamed,
        structured=request.schemas.reply is not None,
        messages=messages,
    )
    steps = engine.run(
        request.prompt,
        sampling,
        grammar=request.grammar,
        budget=context.budget,
        cache_scope=context.cache_scope,
        on_asked=account.record_escalation,
        begun=work.begun,
        deadline=work,
        conversation=conversation,
    )
    steps = work.limiting(steps, request.eos_ids)
    return Generation(
        steps if recording is None else recording(steps, account),
        account,
        request,
        engine.slm.tokenizer,
        ledger=context.ledger,
        on_step=(lambda step: on_step(account.trace_id, step)) if on_step else None,
        asked=asked,
    )
