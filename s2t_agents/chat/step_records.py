"""Steps as a ledger keeps them, as far as its ``Recording`` asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any

from ..ledger import ReceiptCandidate, Recording, StepRecord, StepTimes
from ..types import Candidate, Step

PROMPT_CHARACTERS = 20_000
"""Characters of a prompt's end that are recorded."""
MS = 1000.0


def recorded(
    recording: Recording, steps: Sequence[Step], decode: Callable[[int], str], prompt_text: Callable[[], str]
) -> dict[str, Any]:
    """What a record holds beside sums and receipts: ``steps`` and ``prompt``, or nothing."""
    if not recording.steps:
        return {}
    kept: dict[str, Any] = {"steps": tuple(_step(step, decode if recording.text else None) for step in steps)}
    if recording.text:
        text = prompt_text()
        kept["prompt"] = (
            text if len(text) <= PROMPT_CHARACTERS else "\N{HORIZONTAL ELLIPSIS}" + text[-PROMPT_CHARACTERS:]
        )
    return kept


def _step(step: Step, decode: Callable[[int], str] | None) -> StepRecord:
    times = step.timings
    return StepRecord(
        token=step.token_id,
        by=step.picked_by,
        text=decode(step.token_id) if decode else None,
        wanted=step.wanted_id if step.flipped else None,
        shadow=step.shadow.token_id if step.shadow is not None and step.shadow.flipped else None,
        shadow_by=step.shadow.picked_by if step.shadow is not None and step.shadow.flipped else None,
        triggered=step.triggered,
        entropy=step.entropy if step.entropy is not None and isfinite(step.entropy) else None,  # logits may be NaN
        candidates=candidate_records(step.candidates, decode),
        ms=StepTimes(
            propose=_ms(times.propose),
            grammar=_ms(times.grammar),
            select=_ms(times.select),
            escalate=_ms(times.escalate),
        ),
    )


def candidate_records(
    candidates: Sequence[Candidate], decode: Callable[[int], str] | None
) -> tuple[ReceiptCandidate, ...]:
    """Candidates with their scores; without their texts where ``decode`` is None."""
    return tuple(
        ReceiptCandidate(
            token_id=each.token_id,
            text=decode(each.token_id) if decode else "",
            slm=each.slm,
            selector=each.selector,
            llm=each.llm,
        )
        for each in candidates
    )


def _ms(seconds: float) -> float | None:
    return round(seconds * MS, 3) or None
