"""LangSmith's tracer, with what each answer cost.

::

    agent.invoke(question, {"callbacks": [CostTracer()]})

LangSmith reads a run's cost in ``usage_metadata`` (``total_cost``, USD), which LangChain itself adds up as whole
numbers: on a message it would break ``add_usage``. So it is put on the run that is sent alone; tokens are there without
it. What was picked by whom is in the outputs, in ``response_metadata["s2t"]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from langchain_core.tracers.langchain import LangChainTracer
from langchain_core.tracers.schemas import Run


class CostTracer(LangChainTracer):
    """A ``LangChainTracer`` (its arguments are the same) that sends costs; LangChain adds no second one beside it."""

    def _on_llm_end(self, run: Run) -> None:
        for message in _messages(run.outputs or {}):
            usage, cost = message.get("usage_metadata"), _total_usd(message)
            if isinstance(usage, dict) and cost is not None:
                message["usage_metadata"] = {**usage, "total_cost": cost}
        super()._on_llm_end(run)


def _messages(outputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The fields of the messages in a run's outputs, which are copies: the messages themselves stay as they are."""
    for batch in outputs.get("generations") or ():
        for generation in batch:
            message = generation.get("message") if isinstance(generation, dict) else None
            if isinstance(message, dict) and isinstance(message.get("kwargs"), dict):
                yield message["kwargs"]


def _total_usd(message: dict[str, Any]) -> float | None:
    """What an answer says that it cost; None where that is unknown."""
    s2t = (message.get("response_metadata") or {}).get("s2t")
    total = s2t.get("cost_usd", {}).get("total") if isinstance(s2t, dict) else None
    return float(total) if isinstance(total, int | float) else None
