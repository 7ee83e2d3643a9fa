"""Write the figures of README and docs from the results beside this file: ``python benchmarks/readme.py``.

Nothing between the markers of ``PAGES`` is typed by hand; ``tests/test_readme.py`` holds the two together.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "selectors.md", ROOT / "docs" / "escalation.md")
HARM = {"demo_large": ("demo", "all kinds"), "demo_call": ("call", "tool calls"), "demo_talk": ("talk", "small talk")}
"""Stored evaluations: the task's name at the command line, and what was asked."""

NAMES = {
    "slm": "small model, greedy",
    "maj8": "small model, majority of 8 samples",
    "random": "selector at random steps",
    "head": "**selector (head)**, no LLM",
    "activated": "**selector (activated)**, no LLM",
    "published": "selector (LoRA on the prefix too), no LLM",
    "llm_select": "LLM selects at every trigger",
    "takeover": "LLM writes at every trigger",
    "llm": "large model alone",
}


def evaluation(report: dict[str, Any], made: dict[str, Any]) -> str:
    """The table of ``s2t eval --json``, with where and when it was made."""
    split = {"heldout": ("demo", "held-out"), "hard": ("hard", "hard")}[report["task"].split("/")[1]]
    heads = ("", "accuracy", "95% interval", "gap closed", "LLM calls", "LLM tokens", "tokens", "triggers", "harm")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in report["rows"].items():
        low, high = row["ci95"]
        label = NAMES.get(name, f"selector + at most {name.removeprefix('hybrid_')} LLM picks per answer")
        lines.append(
            f"| {label} | {row['accuracy']:.1%} | {low:.1%} to {high:.1%} | {share(row['gap_closed'])} "
            f"| {row['llm_calls']:.1f} | {row['llm_tokens']:.0f} | {row['tokens']:.0f} | {row['trigger_rate']:.1%} "
            f"| {share(row['broken'])} |"
        )
    what = f"{report['n']} {split[1]} problems, seed {report['seed']}"
    where = f"{made['hardware']}, commit {made['commit']}, {made['date']}"
    command = made.get("command", f"s2t eval --task {split[0]} --n {report['n']} --seed {report['seed']}")
    legend = (
        "Gap closed: of the way from the small model to the large one. Harm: of what the small model alone gets right."
    )
    return "\n".join([*lines, "", legend, f"Per answer; {what}; {where}. Made by `{command}`."])


def harm(stored: dict[str, dict[str, Any]]) -> str:
    """How much of what the small model gets right is wrong with the selector, or with the LLM, in its place."""
    heads = (
        "held-out problems",
        "right before",
        "broken by the selector",
        "95% interval",
        "by the LLM alone",
        "made by",
    )
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, each in stored.items():
        report, made = each["report"], each["made"]
        rows, (task, what) = report["rows"], HARM[name]
        low, high = rows["head"]["broken_ci95"]
        right = round(rows["slm"]["accuracy"] * report["n"])
        command = f"s2t eval --task {task} --n {report['n']} --seed {report['seed']}"
        lines.append(
            f"| {report['n']}, {what} | {right} | {rows['head']['broken']:.1%} | {low:.1%} to {high:.1%} "
            f"| {rows['llm']['broken']:.1%} | `{command}`, commit {made['commit']} |"
        )
    return "\n".join(lines)


def speed(report: dict[str, Any], made: dict[str, Any]) -> str:
    """The tables of ``s2t bench decode --json``: ms a token, first tokens and memory, targets met or missed."""
    lines = []
    shown = ("generate", "engine", "head@0.01", "head@0.1", "activated@0.01", "activated@0.1")
    names = (*shown, "published@0.01", "published@0.1", "maj8")
    lines += ["| ms a token (over our greedy) | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for part in report["decode"]:
        cells = [part["rows"][name] for name in names]
        told = " | ".join(f"{row['ms_per_token']:.3g} ({row['over_greedy']:.2f}x)" for row in cells)
        lines.append(f"| {part['model']}, {part['dtype']}, after {part['prefix']} tokens | {told} |")
    lines += ["", *first_tokens(report)]
    lines += ["", *at_once(report)]
    lines += ["", "| target | wanted | figure | met |", "|---|---|---|---|"]
    for name, each in report["targets"].items():
        lines.append(f"| {name} | {each['wanted']} | {each['figure']:.3g} | {'yes' if each['met'] else '**no**'} |")
    where = f"{made['hardware']}, torch {report['torch']}, commit {made['commit']}, {made['date']}"
    note = (
        "Random weights in the 0.5B shape (speed does not depend on them). The published scheme's selection is timed "
        "and added to our step at each rate; rates of our selectors between the measured ones likewise. Not measured: "
        f"{report['not_measured']}."
    )
    return "\n".join([*lines, "", note, "", f"{where}. Made by `s2t bench decode`."])


def escalation(report: dict[str, Any], made: dict[str, Any]) -> str:
    """The tables of ``s2t bench escalate --json``: what the LLM has to do for the same picks, three ways."""
    heads = (
        "per answer ({tokens:.0f} tokens)".format(**report["ours"]),
        "asked when needed",
        "stepped on every token",
        "ratio",
        "as published, through transformers",
        "ratio",
    )
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    deep = report["at_real_ratio"]
    small, large = deep["parameters"]
    pair, larger = "the pair as it is", f"LLM at {large / small:.0f} times the SLM"
    kinds = [
        ("LLM forwards", report, "llm_calls"),
        ("LLM tokens read", report, "llm_tokens"),
        (f"{pair}: seconds in the LLM", report, "llm_s"),
        (f"{pair}: seconds in all, SLM included", report, "wall_s"),
        (f"{larger}: seconds in the LLM", deep, "llm_s"),
        (f"{larger}: seconds in all", deep, "wall_s"),
    ]
    for what, each, name in kinds:
        cells = [f"{each['ours'][name]:.3g}"]
        for scheme in ("published", "as_published"):
            cells += [f"{each[scheme][name]:.3g}", f"{each[f'{scheme}_over_ours'][name]:.3g}x"]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    same = "the same" if report["picks_identical"] and deep["picks_identical"] else "**different**"
    where = f"{made['hardware']}, one thread, commit {made['commit']}, {made['date']}"
    problems = f"{report['problems']} held-out problems, asked at {report['escalation_rate']:.1%} of the tokens"
    return "\n".join([*lines, "", f"{problems}; all picks are {same}. {where}. Made by `{made['command']}`."])


def first_tokens(report: dict[str, Any]) -> list[str]:
    """Time to the first token and the process's peak memory so far, after each prefix."""
    heads = ("ms to the first token", "generate", "engine", "engine, prompt seen before", "peak memory, MB")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for part in report["decode"]:
        theirs, ours = (part["rows"][name] for name in ("generate", "engine"))
        times = (theirs["first_token_cold_ms"], ours["first_token_cold_ms"], ours["first_token_warm_ms"])
        told = [f"{ms:.3g}" for ms in times]
        lines.append(
            f"| {part['model']}, after {part['prefix']} tokens | {' | '.join(told)} | {part['peak_rss_mb']:.0f} |"
        )
    return lines


def at_once(report: dict[str, Any]) -> list[str]:
    """Generations at once over one after another."""
    heads = ("generations at once", "tokens/s", "over one by one", "without prompts", "ms between tokens: median / p99")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    kinds = [("prompts nobody read", each) for each in report["parallel"]]
    kinds += [("agent loops of {turns} turns, one system prompt".format(**each), each) for each in report["loops"]]
    for kind, each in kinds:
        gaps = f"{each['gap_ms_median']:.3g} / {each['gap_ms_p99']:.3g}"
        ratios = f"{each['ratio']:.2f}x | {each['step_ratio']:.2f}x"
        lines.append(
            f"| {each['model']}, {each['at_once']} {kind} | {each['together_tokens_per_s']:.3g} | {ratios} | {gaps} |"
        )
    return lines


def share(value: float | None) -> str:
    """A share in per cent; a dash where there is none."""
    return "-" if value is None else f"{value:.1%}"


def sections() -> dict[str, str]:
    """What stands between each pair of markers, from the results that are there."""
    found = {}
    file = RESULTS / "demo_eval.json"
    if file.is_file():
        stored = json.loads(file.read_text())
        found["eval"] = evaluation(stored["report"], stored["made"])
    for name in ("hard", "again"):
        file = RESULTS / f"demo_{name}.json"
        if file.is_file():
            stored = json.loads(file.read_text())
            found[name] = evaluation(stored["report"], stored["made"])
    stored = {name: RESULTS / f"{name}.json" for name in HARM}
    if all(file.is_file() for file in stored.values()):
        found["harm"] = harm({name: json.loads(file.read_text()) for name, file in stored.items()})
    file = RESULTS / "escalate.json"
    if file.is_file():
        stored = json.loads(file.read_text())
        found["escalation"] = escalation(stored["report"], stored["made"])
    file = RESULTS / "decode.json"
    if file.is_file():
        stored = json.loads(file.read_text())
        found["speed"] = speed(stored["report"], stored["made"])
    return found


def filled(text: str) -> str:
    """A page with every section replaced by its present content."""
    for name, content in sections().items():
        pattern = rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)"
        text = re.sub(pattern, lambda m, content=content: f"{m[1]}{content}\n{m[2]}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
