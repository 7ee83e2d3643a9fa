"""The table that an evaluation fills: one row per way of answering, the same problems for all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict
from rich.markup import escape
from rich.table import Table

from ..intervals import wilson


class RowReport(BaseModel):
    """One way of answering n problems.

    Attributes:
        name: of the row.
        n: problems.
        accuracy: share of right answers, with its 95% Wilson interval.
        gap_closed: share of the way from the SLM's accuracy to the LLM's; None where there is no gap.
        broken: of the problems that the SLM alone gets right, the share this row gets wrong, with its interval.
        tokens: generated, per answer.
        slm_forwards: of the small model, per answer; prompts count as one.
        llm_calls: forwards of the large model, per answer.
        llm_tokens: that it read or wrote, per answer.
        cost_usd: of the LLM, per answer; None when it has no known price.
        seconds: for all n, answered together; where processes share the problems, the sum of theirs.
        live_seconds: of reports from the time when a bulk loop beside the engine was checked against it; likewise
            ``live_same``.
        trigger_rate: share of all steps; flip_rate likewise; escalation_rate: share of triggered steps.
        agreement: share of triggered steps where the token is the LLM's best candidate (on the first problems).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    n: int
    accuracy: float
    ci95: tuple[float, float]
    gap_closed: float | None = None
    broken: float | None = None
    broken_ci95: tuple[float, float] | None = None
    tokens: float
    slm_forwards: float
    llm_calls: float
    llm_tokens: float
    cost_usd: float | None = None
    seconds: float
    live_seconds: float | None = None
    live_same: float | None = None
    trigger_rate: float
    flip_rate: float
    escalation_rate: float
    agreement: float | None = None


class EvalReport(BaseModel):
    """A whole evaluation.

    Attributes:
        task: name of the task.
        n: problems.
        seed: of random triggers and votes.
        slm: name and fingerprint of the small model; llm likewise.
        hybrid: kind of selector in the hybrid and random rows; None where there was no selector.
        selectors: folder of each, by kind; empty in reports of older versions.
        settings: of the rows.
        rows: by name.
        sweeps: more rows, by what varies ("k", "rate") and then by name.
        verdict: where a selector brought nothing, or harm, what to do next; None otherwise.
        seconds: of the run that finished it; what earlier, killed runs took is in the rows alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    n: int
    seed: int
    slm: dict[str, str]
    llm: dict[str, str]
    hybrid: str | None
    selectors: dict[str, str] = {}
    settings: dict[str, Any]
    rows: dict[str, RowReport]
    sweeps: dict[str, dict[str, RowReport]] = {}
    verdict: str | None = None
    seconds: float


@dataclass
class Tally:
    """Adds up one row, chunk by chunk."""

    name: str
    right: list[bool] = field(default_factory=list)
    count: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    agreed: int = 0
    judged: int = 0

    def add(self, other: Tally) -> None:
        """What other chunks of the same row gave."""
        self.right += other.right
        self.count.update(other.count)
        self.seconds += other.seconds
        self.agreed += other.agreed
        self.judged += other.judged

    def report(self, slm: Sequence[bool], llm: Sequence[bool], price: float | None) -> RowReport:
        """The row, beside what SLM and LLM got right; ``price`` in USD per LLM token."""
        n, count, right = len(self.right), self.count, sum(self.right)
        held = [mine for mine, theirs in zip(self.right, slm, strict=True) if theirs]
        broken = held.count(False)
        gap = sum(llm) - sum(slm)
        return RowReport(
            name=self.name,
            n=n,
            accuracy=right / n,
            ci95=wilson(right, n),
            gap_closed=(right - sum(slm)) / gap if gap > 0 else None,
            broken=broken / len(held) if held else None,
            broken_ci95=wilson(broken, len(held)) if held else None,
            tokens=count["tokens"] / n,
            slm_forwards=count["slm_forwards"] / n,
            llm_calls=count["llm_calls"] / n,
            llm_tokens=count["llm_tokens"] / n,
            cost_usd=0.0 if not count["llm_tokens"] else None if price is None else price * count["llm_tokens"] / n,
            seconds=self.seconds,
            trigger_rate=count["triggered"] / max(1, count["steps"]),
            flip_rate=count["flipped"] / max(1, count["steps"]),
            escalation_rate=count["by_llm"] / max(1, count["triggered"]),
            agreement=self.agreed / self.judged if self.judged else None,
        )


def table(report: EvalReport, rows: dict[str, RowReport] | None = None) -> Table:
    """The report for people; ``rows`` picks others than the main ones."""
    shown = Table(
        title=f"{report.task}, {report.n} problems, seed {report.seed} ({report.seconds:.0f} s this run)",
        caption=escape("\n".join([*(f"{kind}: {at}" for kind, at in report.selectors.items()), report.verdict or ""])),
    )
    for at, name in enumerate(COLUMNS):
        shown.add_column(name, justify="right" if at else "left")
    for row in (rows or report.rows).values():
        shown.add_row(*_cells(row))
    return shown


COLUMNS = (
    "",
    "accuracy",
    "95%",
    "gap closed",
    "harm",
    "tokens",
    "SLM forwards",
    "LLM calls",
    "LLM tokens",
    "$",
    "s an answer",
    "triggers",
    "flips",
    "agreement",
)


def _cells(row: RowReport) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.accuracy:.1%}",
        f"{row.ci95[0]:.1%}-{row.ci95[1]:.1%}",
        share(row.gap_closed),
        share(row.broken),
        f"{row.tokens:.0f}",
        f"{row.slm_forwards:.0f}",
        f"{row.llm_calls:.1f}",
        f"{row.llm_tokens:.0f}",
        "-" if row.cost_usd is None else f"{row.cost_usd:.6f}",
        f"{row.seconds / row.n:.2f}",
        f"{row.trigger_rate:.1%}",
        f"{row.flip_rate:.1%}",
        share(row.agreement),
    )


def share(value: float | None) -> str:
    """A percentage, or a dash where there is none."""
    return "-" if value is None else f"{value:.1%}"
