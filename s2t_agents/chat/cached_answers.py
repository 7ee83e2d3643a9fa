"""Answers from LangChain's cache: at no cost, in metadata and ledger."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration

from ..ledger import Cost, GenerationRecord, Ledger, Thought
from .accounting import record_in_ledger
from .attribution import Caller, current_caller


class CutByBudget(Exception):
    """An answer in LangChain's cache is as long as the budget of the call that made it, which is not in the key."""


def cached_generations(found: Sequence[ChatGeneration], ledger: Ledger | None) -> list[ChatGeneration]:
    """Generations from LangChain's cache, with zero cost in metadata and ledger.

    Raises:
        CutByBudget: one of them was ended by a budget.
    """
    if any(one.message.response_metadata.get("s2t", {}).get("stopped_by") for one in found):
        raise CutByBudget
    return [
        one.model_copy(update={"message": _as_cached(one.message, ledger)})
        if isinstance(one.message, AIMessage)
        else one
        for one in found
    ]


def _as_cached(message: AIMessage, ledger: Ledger | None) -> AIMessage:
    """A message from LangChain's cache, with zero cost, latency and counts of work in its metadata.

    The budget of the call that generated it is removed (another caller must not see it); what is of the text itself, as
    ``degraded``, is kept.

    Args:
        message: as cached; its metadata describe the call that generated it.
        ledger: receives a record with ``cached=True``.
    """
    s2t = message.response_metadata.get("s2t")
    if s2t is None:
        return message
    counts = ("reused_tokens", "triggers", "selections", "flips", "escalations", "refused")
    idle: dict[str, Any] = dict.fromkeys(counts, 0)
    free = {key: dict.fromkeys(s2t[key], 0.0) for key in ("cost_usd", "latency_ms")}
    failed = record_in_ledger(ledger, lambda: _cached_record(message, current_caller())) if ledger is not None else None
    s2t = {key: value for key, value in s2t.items() if key not in _OF_THE_CALL}
    if "thought" in s2t:
        idle["thought"] = {**dict.fromkeys(s2t["thought"], 0), "tokens": s2t["thought"]["tokens"], "llm_usd": 0.0}
    metadata = {
        **message.response_metadata,
        "s2t": {**s2t, **idle, **free, "budget": None, **({} if failed is None else {"ledger_error": failed})},
    }
    return message.model_copy(update={"response_metadata": metadata})


_OF_THE_CALL = ("ledger_error", "shadow")


def _cached_record(message: AIMessage, caller: Caller) -> GenerationRecord:
    usage, metadata = message.usage_metadata, message.response_metadata
    return GenerationRecord(
        agent=caller.agent,
        thread_id=caller.thread_id,
        run_id=caller.run_id,
        model=str(metadata.get("model_name", "")),
        finish_reason=str(metadata.get("finish_reason", "")),
        prompt_tokens=usage["input_tokens"] if usage else 0,
        completion_tokens=usage["output_tokens"] if usage else 0,
        degraded=metadata["s2t"]["degraded"],
        shortened=metadata["s2t"].get("shortened"),
        cached=True,
        cost_usd=Cost(local=Decimal(0), llm=Decimal(0)),
        thought=Thought(tokens=metadata["s2t"].get("thought", {}).get("tokens", 0)),
        trace_id=metadata["s2t"]["trace_id"],
    )
