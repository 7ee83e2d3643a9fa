"""The model card beside a selector's weights: every number in ``selector.json``, for people."""

from __future__ import annotations

from pathlib import Path

from ..atomic_write import write_whole
from ..selectors.config import Calibration, SelectorConfig
from .verdicts import of_calibration, of_training, share


def write_card(folder: Path) -> None:
    """Write ``README.md`` from ``selector.json``; called again after calibration."""
    config = SelectorConfig.load(folder)
    parts = [_head(config), _training(config)]
    parts.append(
        _calibration(config.calibration) if config.calibration else "Not calibrated yet: run `s2t calibrate`.\n"
    )
    write_whole(folder / "README.md", "\n".join(parts).encode())


def _head(config: SelectorConfig) -> str:
    base, made_by = config.base, config.training.get("made_by", "s2t train")
    return f"""# {config.kind} selector for {base.name}

Ranks the {config.k} best candidates of `{base.name}` ({base.model_type}, hidden size {base.hidden_size}) at its
critical steps, as a larger model would. It only ranks: the base's own logits and KV stay as they are.
Made by `{made_by}`; load it with `s2t_agents.selectors.load_selector`. It fits these weights only
(fingerprint `{base.weights_fingerprint}`, tokenizer `{base.tokenizer_fingerprint}`). Its scores are divided by
{config.temperature:.4g}, so that their softmax means a probability; another candidate must beat the base's own
token by {config.caution:.4g} nats.
"""


def _training(config: SelectorConfig) -> str:
    rows = {name: value for name, value in config.training.items() if name not in ("settings", "made_by")}
    settings = config.training.get("settings", {})
    lines = [f"| {name.replace('_', ' ')} | {value} |" for name, value in rows.items()]
    lines += [f"| `{name}` | {value} |" for name, value in settings.items()]
    verdict = of_training(config.training)
    said = [verdict, ""] if verdict else []
    return "\n".join(["## Training", "", *said, "| | |", "|---|---|", *lines, ""])


def _calibration(c: Calibration) -> str:
    rows = [
        ("trigger: entropy from", f"{c.trigger_entropy:.4g} nats"),
        ("trigger rate", share(c.trigger_rate, c.trigger_rate_ci95)),
        ("escalation: margin under", f"{c.escalation_margin:.4g}"),
        ("escalations among triggered steps", share(c.escalation_rate, c.escalation_rate_ci95)),
        ("agreement with the LLM there", share(c.agreement, c.agreement_ci95)),
        ("the same without a selector", f"{c.agreement_greedy:.1%}"),
        ("disagreements found by entropy", "unknown" if c.trigger_recall is None else f"{c.trigger_recall:.1%}"),
        ("disagreements found by the probe", "unknown" if c.probe_recall is None else f"{c.probe_recall:.1%}"),
        ("probe threshold in use", "none" if c.probe_above is None else f"{c.probe_above:.4g}"),
        (
            "answers with nothing to fix that it changes",
            "unknown" if c.false_alarms is None else share(c.false_alarms, c.false_alarms_ci95 or (0.0, 1.0)),
        ),
        ("held-out problems", f"{c.problems} (seed {c.seed})"),
    ]
    bins = [f"| {confidence:.2f} | {right:.2f} | {count} |" for confidence, right, count in c.reliability]
    table = [f"| {name} | {value} |" for name, value in rows]
    head = ["| confidence | agreement | steps |", "|---|---|---|"]
    verdict = of_calibration(c)
    said = [verdict, ""] if verdict else []
    return "\n".join(["## Calibration", "", *said, "| | |", "|---|---|", *table, "", *head, *bins, ""])
