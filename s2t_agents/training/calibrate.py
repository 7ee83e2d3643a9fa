"""Thresholds from held-out rollouts: trigger, caution, temperature, escalation. Test problems are never read here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..atomic_write import sole_run
from ..errors import InputError
from ..intervals import wilson
from ..scheduling.language_model import LanguageModel
from ..selectors import LocalSelector, SelectorConfig, load_selector
from ..selectors.config import BaseIdentity, Calibration
from ..selectors.head import HeadSelector
from ..selectors.learned_trigger import PROBE_FILE, load_probe
from ..selectors.reference import Reference
from .card import write_card
from .config import CalibrateConfig, Fit
from .disagreement import Probe, hidden_along
from .groups import Example, choose, read_for, threshold_for
from .losses import agreements
from .objectives import objective_for
from .shards import read_manifest
from .statistics import best_temperature, reliability

RATES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5)
"""Trigger rates whose entropy thresholds are written down."""

WORTH = 0.02
"""The probe replaces the entropy trigger where it finds so much more of the disagreements at the same rate."""


class Calibrated(Calibration):
    """A calibration, with what is wrong with the selector by its figures.

    Attributes:
        verdict: see ``verdicts.of_calibration``.
    """

    verdict: str | None = None


def calibrate_with(slm: LanguageModel, config: CalibrateConfig) -> Calibration:
    """Set a selector's caution, temperature and thresholds, write them into its ``selector.json`` and its card.

    Intervals treat steps as independent; steps of one answer are not quite, so the true ones are somewhat wider.

    Raises:
        FolderInUse: another run is at work on this selector.
        ModelNotFound, ConfigError, AdapterMismatch: no selector, or one for another base.
        InputError: unfinished or empty rollouts.
    """
    with sole_run(config.selector):
        return _calibrate(slm, config)


def _calibrate(slm: LanguageModel, config: CalibrateConfig) -> Calibration:
    selector, kept = load_selector(config.selector, slm)
    selector.temperature, selector.caution = 1.0, 0.0
    shards = read_for(slm, [config.rollouts], kept.k)
    examples = _finished(choose(shards, k=kept.k, rate=1.0, kl_rate=0.0), config.rollouts)
    spread = threshold_for(torch.cat([example.entropy for example in examples]), config.targets.trigger_rate)
    trigger = _trigger(config, kept, slm, examples, spread)
    critical = torch.cat(trigger.critical)
    if not critical.any():
        raise InputError("no held-out step reaches the trigger.", hint="Collect more, or raise trigger_rate.")
    at_trigger = [_only(example, steps) for example, steps in zip(examples, trigger.critical, strict=True)]
    raw, llm, slm_scores = scored(selector, at_trigger)
    answers = torch.tensor([len(example.positions) for example in at_trigger])
    selector.caution = caution = least_caution(raw, llm, answers, config.targets.false_alarms)
    cautious = selector.calibrated(raw, torch.zeros_like(raw))
    temperature = best_temperature(cautious, llm.argmax(-1))
    scores = cautious / temperature
    sure = margins(scores)
    margin = margin_for(sure, config.targets.escalation_rate)
    goes_up = sure < margin
    right = agreements(scores, llm)
    alarmed, quiet = _false_alarms(scores, llm, answers)
    calibration = Calibration(
        trigger_entropy=max(0.0, spread),
        trigger_rate=float(critical.float().mean()),
        trigger_rate_ci95=wilson(int(critical.sum()), len(critical)),
        escalation_margin=margin,
        escalation_rate=float(goes_up.float().mean()),
        escalation_rate_ci95=wilson(int(goes_up.sum()), len(goes_up)),
        agreement=float(right.float().mean()),
        agreement_ci95=wilson(int(right.sum()), len(right)),
        agreement_greedy=float(agreements(slm_scores, llm).float().mean()),
        false_alarms=alarmed / quiet if quiet else None,
        false_alarms_ci95=wilson(alarmed, quiet) if quiet else None,
        problems=len({example.item for example in examples}),
        seed=config.seed,
        trigger_recall=trigger.entropy_recall,
        probe_above=trigger.probe_above,
        probe_recall=trigger.probe_recall,
        entropy_at=_entropies(examples),
        reliability=reliability(scores.softmax(-1).amax(-1), right),
    )
    selector.temperature = temperature
    Reference.of(selector, slm).save(config.selector)
    now = {"base": BaseIdentity.of(slm), "temperature": temperature, "caution": caution, "calibration": calibration}
    kept = kept.model_copy(update=now)
    kept.save(config.selector)
    write_card(config.selector)
    return calibration


def _finished(examples: Sequence[Example], rollouts: Path) -> list[Example]:
    """Without the answers that ran into ``max_tokens``, unless all did.

    Such an answer has lost its way and is unsure to its end: with many of them among the rollouts, a share of all steps
    would be a much smaller share of the steps of answers that can still be put right.
    """
    limit = read_manifest(rollouts).settings["max_tokens"]
    return [example for example in examples if len(example.all_positions) < limit] or list(examples)


@dataclass(frozen=True)
class _Trigger:
    """Which steps are critical, and how well entropy and probe find the disagreements at the same rate.

    Attributes:
        critical: per example ``[n]`` bool.
        probe_above: the probe's threshold where the probe is in use; None where the entropy is.
    """

    critical: list[Tensor]
    entropy_recall: float
    probe_recall: float | None = None
    probe_above: float | None = None


def _trigger(
    config: CalibrateConfig, kept: SelectorConfig, slm: LanguageModel, examples: Sequence[Example], spread: float
) -> _Trigger:
    """The entropy's trigger, or the probe's at the same rate where that finds more."""
    differs = torch.cat([example.differs for example in examples])
    by_entropy = [example.entropy >= spread for example in examples]
    critical = torch.cat(by_entropy)
    found = _recall(differs, critical)
    if not (config.selector / PROBE_FILE).exists():
        return _Trigger(by_entropy, found)
    probe = Probe(*load_probe(config.selector, kept))
    hidden = hidden_along(slm, examples)
    likely = [probe.probabilities(h, e.entropy) for h, e in zip(hidden, examples, strict=True)]
    above = threshold_for(torch.cat(likely), float(critical.float().mean()))
    by_probe = [each >= above for each in likely]
    probe_found = _recall(differs, torch.cat(by_probe))
    if probe_found > found + WORTH:
        return _Trigger(by_probe, found, probe_found, above)
    return _Trigger(by_entropy, found, probe_found)


def _recall(differs: Tensor, critical: Tensor) -> float:
    """Share of the disagreements that lie among the critical steps."""
    return float(differs[critical].sum() / differs.sum().clamp_min(1))


def _entropies(examples: Sequence[Example]) -> tuple[tuple[float, float], ...]:
    """The entropy threshold of each of ``RATES``."""
    entropy = torch.cat([example.entropy for example in examples])
    return tuple((rate, max(0.0, threshold_for(entropy, rate))) for rate in RATES)


def margin_for(sure: Tensor, rate: float) -> float:
    """The margin under which a share ``rate`` of ``sure`` ``[M]`` in [0, 1] lies: half way to the next value.

    Values that are equal there stay out together: fewer questions than planned, not more.
    """
    ordered = sure.double().sort().values
    below = round(rate * len(ordered))
    if below >= len(ordered):
        return 1.0
    return float(ordered[max(0, below - 1) : below + 1].mean()) if below else float(ordered[0])


def least_caution(raw: Tensor, llm: Tensor, answers: Tensor, target: float | None) -> float:
    """The least caution, in nats, at which no more than a share ``target`` of the quiet answers is changed.

    Args:
        raw: ``[M, K]`` scores at critical steps, best SLM candidate first.
        llm: ``[M, K]``.
        answers: critical steps of each answer, in order.
        target: None asks for none.
    """
    if target is None:
        return 0.0
    lead = raw.amax(-1) - raw[:, 0]  # what it takes to keep the SLM's token here
    worst = torch.stack([part.amax() for part in _quiet(lead, llm, answers)] or [torch.zeros(())])
    allowed = int(target * len(worst))
    needed = float(worst.sort(descending=True).values[min(allowed, len(worst) - 1)])
    return 0.0 if needed <= 0 else needed * (1 + 1e-4)


def _false_alarms(scores: Tensor, llm: Tensor, answers: Tensor) -> tuple[int, int]:
    """Quiet answers that the selector changes, and all of them."""
    flips = (scores.argmax(-1) != 0).float()
    changed = [bool(part.any()) for part in _quiet(flips, llm, answers)]
    return sum(changed), len(changed)


def _quiet(values: Tensor, llm: Tensor, answers: Tensor) -> list[Tensor]:
    """``values`` ``[M]`` by answer, of those with critical steps where the LLM wants the SLM's own token at each."""
    keeps = torch.split(llm.argmax(-1) == 0, answers.tolist())
    parts = torch.split(values, answers.tolist())
    return [part for part, keep in zip(parts, keeps, strict=True) if len(part) and bool(keep.all())]


def _only(example: Example, steps: Tensor) -> Example:
    """The example with these of its critical steps; all steps are critical in ``examples`` chosen at rate 1."""
    return replace(
        example,
        positions=example.positions[steps],
        candidates=example.candidates[steps],
        slm=example.slm[steps],
        llm=example.llm[steps],
    )


@torch.no_grad()
def scored(selector: LocalSelector, examples: list[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Raw scores, LLM and SLM log-probabilities ``[M, K]`` of all groups of these examples.

    The selector's temperature is not applied.
    """
    with_groups = [example for example in examples if len(example.positions)]
    hidden = hidden_along(selector.base, with_groups) if isinstance(selector, HeadSelector) else []
    objective = objective_for(selector, with_groups, hidden, Fit())
    pieces = list(objective.pieces(list(range(len(objective.sizes)))))
    return (
        torch.cat([piece.scores for piece in pieces]).float().cpu(),
        torch.cat([piece.llm for piece in pieces]).cpu(),
        torch.cat([piece.slm for piece in pieces]).cpu(),
    )


def margins(scores: Tensor) -> Tensor:
    """``selectors.confidence_margin`` for many rows: from ``[N, K]`` to ``[N]``, 1 where K is 1."""
    if scores.shape[1] < 2:
        return torch.ones(scores.shape[0], device=scores.device)
    best = scores.softmax(-1).topk(2).values
    return best[:, 0] - best[:, 1]
