"""From a ledger to one self-contained HTML page: what was picked, by whom, why, at what price and in what time.
What it does in the browser stands in ``page.html``.

The page loads nothing and may connect to nothing (its content security policy names its own script and style by hash);
the data are escaped JSON that no browser executes, and the script puts text into the page as text alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from ..atomic_write import write_whole
from ..errors import ConfigError, LedgerError
from ..ledger import GenerationRecord, Ledger, ReceiptCandidate, StepRecord

MAX_ANSWERS = 100_000
"""Answers in one page, at most; browsers are slow with more."""
MAX_CHARTS = 60
CHART_POINTS = 300


def write_trace(ledger: Path, page: Path, *, last: int = 2000, agent: str | None = None) -> int:
    """Write the page of a ledger's file.

    Args:
        ledger: the file, which is only read.
        page: the file that is written, or replaced.
        last: how many answers the page shows, the newest; its sums are of all.
        agent: shows answers of this agent and of its parts alone.

    Returns:
        How many answers the page shows.

    Raises:
        LedgerError: no such ledger, or a damaged one; no answer of that agent; ``last`` out of range.
        ConfigError: the page would take the ledger's place, by whatever name, or has no folder.
        S2TError: the page cannot be written.
    """
    check_last(last)
    opened = Ledger.reading(ledger)
    if page.exists() and page.samefile(ledger):
        raise ConfigError(f"The page {page} would replace the ledger itself.", hint="Choose another file for the page.")
    if not page.absolute().parent.is_dir():
        raise ConfigError(f"{page}: there is no such folder.", hint="Make it first.")
    made = trace_of(opened, name=ledger.name, last=last, whose=None if agent is None else part_of(agent))
    if agent is not None and not made.total:
        raise LedgerError(f"{ledger} has no answer of the agent {agent!r:.200}.", hint="s2t report lists the agents.")
    write_whole(page, made.html.encode())
    return min(last, made.total)


def part_of(agent: str) -> Callable[[str], bool]:
    """Whether a name is this agent's or that of a part of it, as ``researcher/writer`` of ``researcher``."""
    return lambda name: name == agent or name.startswith(f"{agent}/")


def check_last(last: int) -> None:
    """Refuse a number of answers that no page shows (LedgerError)."""
    if not 1 <= last <= MAX_ANSWERS:
        raise LedgerError(f"last is {last}.", hint=f"Choose from 1 to {MAX_ANSWERS:,} answers.")


class TracePage(NamedTuple):
    """A page, and how many answers the ledger has of those whose page it is."""

    html: str
    total: int


def trace_of(
    ledger: Ledger,
    *,
    name: str,
    last: int = 2000,
    whose: Callable[[str], bool] | None = None,
    reload_s: float | None = None,
) -> TracePage:
    """The page of a ledger.

    Args:
        ledger: is read from its beginning to its end.
        name: of the ledger.
        last: how many answers the page shows, the newest.
        whose: of which agents, by name; None is all.
        reload_s: seconds after which the page loads itself again, at least; twenty times as long as it took to make, if
            that is more. None never does.

    Raises:
        LedgerError: it cannot be read.
    """
    started = time.perf_counter()
    shown: deque[GenerationRecord] = deque(maxlen=last)
    total = 0
    for record in ledger:
        if whose is None or whose(record.agent):
            shown.append(record)
            total += 1
    agents = [each for each in _agents(ledger) if whose is None or whose(each["name"])]
    if reload_s is not None:
        reload_s = max(reload_s, 20 * (time.perf_counter() - started))
    return TracePage(page_of(shown, agents=agents, name=name, total=total, reload_s=reload_s), total)


def page_of(
    records: Iterable[GenerationRecord],
    *,
    agents: list[dict[str, Any]],
    name: str,
    total: int,
    reload_s: float | None = None,
) -> str:
    """The page.

    Args:
        records: the answers that it shows, oldest first.
        agents: sums by agent, as the page's table has them.
        name: of the ledger.
        total: answers in the ledger.
        reload_s: seconds after which the page loads itself again; None never does.
    """
    listed = list(records)
    data = {
        "file": name,
        "made": datetime.now(UTC).isoformat(),
        "total": total,
        "reload_s": reload_s,
        "agents": agents,
        "burndown": list(_burndown(listed))[: -MAX_CHARTS - 1 : -1],
        "records": [_answer(record) for record in listed],
    }
    before, after = _template()
    return before + _escaped(data) + after


def _escaped(data: Any) -> str:
    """JSON that ends no script element and that every browser parses."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@cache
def _template() -> tuple[str, str]:
    """The page before and after its data, with its content security policy."""
    page = (files(__package__) / "page.html").read_text(encoding="utf-8")
    [style] = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    [script] = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    before, after = page.replace("@POLICY@", policy).split("@DATA@")
    return before, after


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _agents(ledger: Ledger) -> Iterator[dict[str, Any]]:
    for name, sums, latency in ledger.grouped("agent"):
        total = latency.get("total")
        yield {
            "name": name,
            "answers": sums.generations,
            "tokens": sums.completion_tokens,
            "flips": sums.flips,
            "escalations": sums.escalations,
            "refused": sums.refused,
            "degraded": sums.degraded,
            "llm_usd": _text(sums.cost_usd.llm.usd),
            "total_usd": _text(sums.cost_usd.total.usd),
            "p50_ms": total.p50 if total is not None else None,
            "p95_ms": total.p95 if total is not None else None,
        }


def _burndown(records: list[GenerationRecord]) -> Iterator[dict[str, Any]]:
    """What was left of each budget after each answer, by unit; the one that was last in use comes last.

    A budget is one line, whichever agents share it; one of which nothing was spent is left out. Records of before
    budgets told their path are one line for each agent's thread or run.
    """
    lines: dict[tuple[str | None, str | None, str], tuple[Any, list[Any]]] = {}
    for record in records:
        budget = record.budget or {}
        limits, left = budget.get("limit"), budget.get("left")
        if not isinstance(limits, dict) or not isinstance(left, dict):
            continue
        path = budget.get("path")
        owner = (None, path) if path else (record.agent, record.thread_id or record.run_id)
        for unit, limit in limits.items():
            if unit in left:
                _, points = lines.pop((*owner, str(unit)), (limit, []))
                lines[*owner, str(unit)] = (limit, [*points[1 - CHART_POINTS :], left[unit]])
    for (agent, budget_or_run, unit), (limit, points) in lines.items():
        if any(point != limit for point in points):
            yield {"agent": agent, "run": budget_or_run, "unit": unit, "limit": limit, "left": points}


def _answer(record: GenerationRecord) -> dict[str, Any]:
    steps = record.steps
    return {
        "id": record.id,
        "agent": record.agent,
        "thread": record.thread_id,
        "run": record.run_id,
        "trace": record.trace_id,
        "model": record.model,
        "llm": record.llm_model,
        "at": record.started_at.isoformat(),
        "finish": record.finish_reason,
        "prompt_tokens": record.prompt_tokens,
        "tokens": record.completion_tokens,
        "flips": record.flips,
        "escalations": record.escalations,
        "refused": record.refused,
        "degraded": record.degraded,
        "shortened": record.shortened,
        "cached": record.cached,
        "cost": {part: _text(getattr(record.cost_usd, part)) for part in ("local", "llm")},
        "latency": record.latency_ms.model_dump(),
        "thought": record.thought.tokens,
        "error": record.error,
        "prompt": record.prompt,
        "with_text": steps is not None and any(step.text is not None for step in steps),
        "receipts": [_receipt(each.model_dump(mode="json"), each.candidates) for each in record.receipts],
        "steps": None if steps is None else [_step(step) for step in steps],
    }


def _receipt(dumped: dict[str, Any], candidates: Iterable[ReceiptCandidate]) -> dict[str, Any]:
    kept = ("step", "pick", "outcome", "reserved", "actual", "refused_by", "wait_ms", "reason")
    return {**{name: dumped[name] for name in kept}, "candidates": [_candidate(each) for each in candidates]}


def _step(step: StepRecord) -> dict[str, Any]:
    texts: dict[int | None, str] = {each.token_id: each.text for each in reversed(step.candidates) if each.text}
    found = {
        "token": step.token,
        "text": step.text,
        "by": step.by,
        "wanted": step.wanted,
        "wanted_text": texts.get(step.wanted),
        "shadow": step.shadow,
        "shadow_by": step.shadow_by,
        "shadow_text": texts.get(step.shadow),
        "critical": step.triggered or None,
        "entropy": step.entropy,
        "candidates": [_candidate(each) for each in step.candidates] or None,
        "ms": step.ms.model_dump(exclude_none=True) or None,
    }
    return {name: value for name, value in found.items() if value is not None}  # token 0 and an entropy of 0 stay


def _candidate(candidate: ReceiptCandidate) -> dict[str, Any]:
    scores = {name: _finite(getattr(candidate, name)) for name in ("slm", "selector", "llm")}
    return {"id": candidate.token_id, "text": candidate.text, **scores}


def _finite(score: float | None) -> float | str | None:
    """A score as strict JSON: infinity as a text."""
    if score is None or abs(score) < float("inf"):
        return score
    return "-Infinity" if score < 0 else "Infinity" if score > 0 else None


def _text(usd: Any) -> str | None:
    return None if usd is None else f"{usd:f}"
