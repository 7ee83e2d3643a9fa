"""Thresholds from held-out rollouts: temperature, trigger, escalation margin. Test problems are never read here."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from ..models.language_model import LanguageModel
from ..selectors import LocalSelector, SelectorConfig, load_selector
from ..selectors.config import Calibration
from ..selectors.learned_trigger import PROBE_FILE, load_probe
from .card import write_card
from .config import CalibrateConfig, Fit
from .deciders import margins
from .disagreement import Probe, hidden_along
from .groups import Example, choose, read_for, threshold_for
from .losses import agreements
from .objectives import objective_for
from .statistics import best_temperature, reliability, wilson

RATES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5)
"""Trigger rates whose entropy thresholds are written down."""

WORTH = 0.02
"""The probe replaces the entropy trigger where it finds so much more of the disagreements at the same rate."""


def calibrate(config: CalibrateConfig) -> Calibration:
    """Set a selector's temperature and thresholds, write them into its ``selector.json`` and its card.

    Intervals treat steps as independent; steps of one answer are not quite, so the true ones are somewhat wider.

    Raises:
        ModelNotFound, ConfigError, AdapterMismatch: no selector, or one for another base.
        InputError: unfinished or empty rollouts.
    """
    return calibrate_with(config.models.load_slm(), config)


def calibrate_with(slm: LanguageModel, config: CalibrateConfig) -> Calibration:
    """``calibrate`` on a model that is loaded already."""
    selector, kept = load_selector(config.selector, slm)
    selector.temperature = 1.0
    shards = read_for(slm, [config.rollouts], kept.k)
    examples = choose(shards, k=kept.k, rate=1.0, kl_rate=0.0)
    entropy = torch.cat([example.entropy for example in examples])
    differs = torch.cat([example.differs for example in examples])
    spread = threshold_for(entropy, config.targets.trigger_rate)
    critical = entropy >= spread
    if not critical.any():
        raise InputError("no held-out step reaches the trigger.", hint="Collect more, or raise trigger_rate.")
    scores, llm, slm_scores = scored(selector, [_only(example, example.entropy >= spread) for example in examples])
    temperature = best_temperature(scores, llm.argmax(-1))
    sure = margins(scores / temperature)
    margin = min(1.0, max(0.0, -threshold_for(-sure, config.targets.escalation_rate)))
    goes_up = sure < margin
    right = agreements(scores, llm)
    found = float(differs[critical].sum() / differs.sum().clamp_min(1))
    probe_above, probe_found = _probe_threshold(config, kept, slm, examples, differs, float(critical.float().mean()))
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
        problems=len({example.item for example in examples}),
        seed=config.seed,
        trigger_recall=found,
        probe_above=probe_above if probe_found is not None and probe_found > found + WORTH else None,
        probe_recall=probe_found,
        entropy_at=tuple((rate, max(0.0, threshold_for(entropy, rate))) for rate in RATES),
        reliability=reliability((scores / temperature).softmax(-1).amax(-1), right),
    )
    kept.model_copy(update={"temperature": temperature, "calibration": calibration}).save(config.selector)
    write_card(config.selector)
    return calibration


def _only(example: Example, steps: Tensor) -> Example:
    """The example with these of its critical steps; all steps are critical in ``examples`` chosen at rate 1."""
    return Example(
        example.ids,
        example.item,
        example.positions[steps],
        example.candidates[steps],
        example.slm[steps],
        example.llm[steps],
        example.all_positions,
        example.differs,
        example.entropy,
    )


@torch.no_grad()
def scored(selector: LocalSelector, examples: list[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Raw scores, LLM and SLM log-probabilities ``[M, K]`` of all groups of these examples.

    The selector's temperature is not applied.
    """
    with_groups = [example for example in examples if len(example.positions)]
    hidden = hidden_along(selector.base, with_groups)
    objective = objective_for(selector, with_groups, hidden, Fit())
    pieces = list(objective.pieces(list(range(len(objective.sizes)))))
    return (
        torch.cat([piece.scores for piece in pieces]).float().cpu(),
        torch.cat([piece.llm for piece in pieces]).cpu(),
        torch.cat([piece.slm for piece in pieces]).cpu(),
    )


def _probe_threshold(
    config: CalibrateConfig,
    kept: SelectorConfig,
    slm: LanguageModel,
    examples: list[Example],
    differs: Tensor,
    rate: float,
) -> tuple[float | None, float | None]:
    """The probe's threshold at this trigger rate, and the share of disagreements it finds; None without a probe."""
    if not (config.selector / PROBE_FILE).exists():
        return None, None
    probe = Probe(*load_probe(config.selector, kept))
    hidden = hidden_along(slm, examples)
    likely = torch.cat([probe.probabilities(h, e.entropy) for h, e in zip(hidden, examples, strict=True)])
    above = threshold_for(likely, rate)
    return above, float(differs[likely >= above].sum() / differs.sum().clamp_min(1))
