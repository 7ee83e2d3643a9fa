"""Local sufficiency: where SLM and LLM differ, does the SLM know the LLM's token? And can it tell without the LLM?

Select to Think, section 3 (arXiv 2604.26940): at the steps of largest divergence the LLM's token is rarely the SLM's
first choice and nearly always among its first eight.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from rich.table import Table
from torch import Tensor

from ..atomic_write import write_whole
from ..intervals import wilson
from ..scheduling.language_model import LanguageModel
from ..selectors.config import SelectorConfig
from ..selectors.learned_trigger import PROBE_FILE, load_probe
from .config import ProbeConfig
from .disagreement import Probe, hidden_along
from .groups import choose, read_for, threshold_for
from .plots import draw_hits
from .shards import Shard
from .statistics import roc_auc
from .verdicts import of_difference, of_hits

RATES = (0.01, 0.05, 0.1)


class HitRow(BaseModel):
    """Hit@1..K over one set of steps.

    Attributes:
        by: what the steps were ranked by: kl, entropy or probe.
        rate: share of steps, the highest-ranked.
        steps: how many.
        hits: share of them where the LLM's best token is among the SLM's best 1, 2, .. K.
        recall: share of all disagreements that lie among them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    by: str
    rate: float
    steps: int
    hits: tuple[float, ...]
    hit1_ci95: tuple[float, float]
    recall: float | None


class Sufficiency(BaseModel):
    """What ``probe`` finds.

    Attributes:
        steps: of all rollouts.
        disagreement: share of them where the LLM's best token is not the SLM's.
        accuracy: share of trajectories whose answer was right.
        answers_differing: share of trajectories with such a step; None in reports of older versions.
        verdict: what that comes to where there is little to learn, or too little to tell; None otherwise.
        rows: Hit@K.
        auc: ROC-AUC of each LLM-free ranking for finding the disagreements; None where there are none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int
    disagreement: float
    accuracy: float
    rows: tuple[HitRow, ...]
    auc: dict[str, float | None]
    answers_differing: float | None = None
    verdict: str | None = None


def probe(config: ProbeConfig) -> Sufficiency:
    """Measure local sufficiency on a folder of rollouts; writes ``sufficiency.json`` and a plot where asked.

    Raises:
        ModelNotFound, InputError, ConfigError: no rollouts, unfinished ones, or those of another model.
        AdapterMismatch: the selector's probe was learned on another model.
    """
    slm = config.models.load_slm()
    report = probe_with(slm, config)
    if config.out is not None:
        write_whole(config.out / "sufficiency.json", (report.model_dump_json(indent=2) + "\n").encode())
        lines: dict[str, Sequence[float]] = {f"top {row.rate:.0%} by {row.by}": row.hits for row in report.rows}
        draw_hits(lines, config.out / "sufficiency.png")
    return report


def probe_with(slm: LanguageModel, config: ProbeConfig) -> Sufficiency:
    """``probe`` on a model that is loaded already."""
    shards = [shard for _, shard in read_for(slm, [config.rollouts], 1)]
    rank = _ranks(shards)
    differs = rank != 0
    rankings = {"kl": torch.cat([shard.kl for shard in shards]), "entropy": torch.cat([s.entropy for s in shards])}
    learned = _learned(slm, config)
    if learned is not None:
        rankings["probe"] = learned
    disagreement = float(differs.float().mean())
    lengths = torch.cat([shard.ends.diff(prepend=shard.ends.new_zeros(1)) for shard in shards])
    owner = torch.arange(len(lengths)).repeat_interleave(lengths)
    differing = len(set(owner[differs].tolist())) / len(lengths)
    k = min(shard.candidates.shape[1] for shard in shards)
    rows = [_row(by, values, rate, rank, k) for by, values in rankings.items() for rate in RATES]
    return Sufficiency(
        steps=len(rank),
        disagreement=disagreement,
        accuracy=float(torch.cat([shard.right for shard in shards]).float().mean()),
        rows=tuple(rows),
        auc={by: roc_auc(values, differs) for by, values in rankings.items() if by != "kl"},
        answers_differing=differing,
        verdict=of_difference(disagreement, differing) or of_hits(rows[0].by, rows[0].rate, rows[0].steps),
    )


def _ranks(shards: Sequence[Shard]) -> Tensor:
    """``[N]``: place of the LLM's best token among the SLM's candidates, from 0; K where it is not among them."""
    found = []
    for shard in shards:
        same = shard.candidates == shard.llm_best[:, None]
        found.append(torch.where(same.any(1), same.int().argmax(1), same.shape[1]))
    return torch.cat(found)


def _row(by: str, values: Tensor, rate: float, rank: Tensor, k: int) -> HitRow:
    chosen = values >= threshold_for(values, rate)
    ranks = rank[chosen]
    hits = tuple(round(float((ranks < at).float().mean()), 4) for at in range(1, k + 1))
    wrong = int((rank != 0).sum())
    return HitRow(
        by=by,
        rate=rate,
        steps=len(ranks),
        hits=hits,
        hit1_ci95=wilson(int((ranks == 0).sum()), len(ranks)),
        recall=int((ranks != 0).sum()) / wrong if wrong else None,
    )


def _learned(slm: LanguageModel, config: ProbeConfig) -> Tensor | None:
    """``[N]`` the learned probe's probabilities, in the order of the shards' steps."""
    if config.selector is None or not (Path(config.selector) / PROBE_FILE).exists():
        return None
    kept = SelectorConfig.load(config.selector)
    kept.check_base(slm)
    fitted = Probe(*load_probe(config.selector, kept))
    examples = choose(read_for(slm, [config.rollouts], 1), k=1, rate=1.0, kl_rate=0.0)
    hidden = hidden_along(slm, examples)
    return torch.cat([fitted.probabilities(h, e.entropy) for h, e in zip(hidden, examples, strict=True)])


def table(report: Sufficiency) -> Table:
    """The report for people."""
    answers = "" if report.answers_differing is None else f", in {report.answers_differing:.1%} of the answers"
    shown = Table(
        title=f"{report.steps:,} steps; the LLM disagrees at {report.disagreement:.1%}{answers}; "
        + ", ".join(f"AUC {name} {'-' if auc is None else f'{auc:.3f}'}" for name, auc in report.auc.items()),
        caption=report.verdict,
    )
    ks = [k for k in (1, 2, 4, 8, 16) if k <= len(report.rows[0].hits)]
    for name in ("steps ranked by", "top", "steps", *(f"Hit@{k}" for k in ks), "recall"):
        shown.add_column(name, justify="right")
    for row in report.rows:
        hits = [f"{row.hits[k - 1]:.1%}" for k in ks]
        recall = "-" if row.recall is None else f"{row.recall:.1%}"
        shown.add_row(row.by, f"{row.rate:.0%}", f"{row.steps:,}", *hits, recall)
    return shown
