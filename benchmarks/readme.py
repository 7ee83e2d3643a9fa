"""Write the figures of README and docs from the results beside this file: ``python -m benchmarks.readme``.

Nothing between the markers of ``PAGES`` is typed by hand; ``tests/test_readme.py`` holds the two together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import against, engines_report, served
from .chat import CHAT
from .speed import targets
from .targets import Verdict, at_least, targets_of

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("selectors", "escalation", "performance", "gguf")),
    ROOT / "examples" / "real_pair" / "README.md",
)
HARM = {
    "demo_large": ("demo", "all kinds"),
    "demo_seed7": ("demo", "all kinds"),
    "demo_call": ("call", "tool calls"),
    "demo_talk": ("talk", "small talk"),
}
"""Stored evaluations: the task's name at the command line, and what was asked."""

KINDS = ("head", "activated")
"""Selectors that a speed is wanted of."""

BEYOND = {
    "demo_longer": "one more step than any in training",
    "demo_larger": "numbers beyond those of training",
    "demo_unseen": "sentences that training has not seen",
}
"""Stored evaluations of problems that go beyond training in one way each."""

NAMES = {
    "slm": "small model, greedy",
    "maj1": "small model, one sample",
    "maj8": "small model, majority of 8 samples",
    "random": "selector at random steps",
    "head": "**selector (head)**, no LLM",
    "activated": "**selector (activated)**, no LLM",
    "adapted": "**selector (adapted)**, no LLM",
    "published": "selector (published), no LLM",
    "llm_select": "LLM selects at every trigger",
    "takeover": "LLM writes at every trigger",
    "llm": "large model alone",
}


TASKS = {
    "demo/heldout": ("demo", "held-out problems"),
    "demo/hard": ("hard", "hard problems"),
    "bfcl/simple_python": ("bfcl", "function calls, `simple_python` of the Berkeley Function Calling Leaderboard"),
    "bfcl/multiple": ("multiple", "function calls, `multiple` of the Berkeley Function Calling Leaderboard"),
    "svamp": ("svamp", "word problems of SVAMP"),
}
"""Stored evaluations by their task: its name at the command line, and what was asked."""


def evaluation(report: dict[str, Any], made: dict[str, Any]) -> str:
    """The table of ``s2t eval --json``, with where and when it was made."""
    task, problems = TASKS[report["task"]]
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
    what = f"{report['n']} {problems}, seed {report['seed']}"
    where = f"{made['hardware']}, commit {made['commit']}, {made['date']}"
    command = made.get("command", f"s2t eval --task {task} --n {report['n']} --seed {report['seed']}")
    legend = (
        "Gap closed: share of the accuracy gap between the small and the large model that is recovered. "
        "Harm: share of the small model's right answers that become wrong."
    )
    return "\n".join([*lines, "", legend, f"Per answer; {what}; {where}. Made by `{command}`."])


def real(report: dict[str, Any], made: dict[str, Any]) -> str:
    """``evaluation`` of the real pair, with what its rows take of time, and how often the LLM is asked."""
    lines = evaluation(report, made).split("\n")
    rows = list(report["rows"].values())
    lines[0] += " LLM asked at | agreement | MB | s an answer |"
    lines[1] += "---|---|---|---|"
    for at, row in enumerate(rows, 2):
        asked = "-" if row["name"] == "llm" else f"{row['llm_calls'] / max(1e-9, row['tokens']):.1%}"
        lines[at] += f" {asked} | {share(row['agreement'])} | {made['megabytes'][row['name']]} "
        lines[at] += f"| {row['seconds'] / report['n']:.2f} |"
    lines[-2] += (
        " LLM asked at: share of the tokens. Agreement: with the LLM's pick, at triggered steps. MB: of weights, "
        "those of the small model packed. Seconds: in bulk."
    )
    return "\n".join(lines)


PAIRS = {
    "real_eval": ("SmolLM2-135M, quantised, behind itself", "adapted"),
    "demo_eval": ("the bundled pair", "head"),
}
"""Stored evaluations of the first table, with the kind of selector that its hybrid rows have."""


def gains(stored: dict[str, dict[str, Any]]) -> str:
    """What each step up brings, on each pair: accuracy, share of the gap, questions to the large model, harm."""
    heads = [
        f"{pair}: accuracy (95%) | gap closed | questions an answer | harm"
        for pair, _ in (PAIRS[name] for name in stored)
    ]
    lines = [f"|  | {' | '.join(heads)} |", "|---" * (1 + 4 * len(stored)) + "|"]
    for label, row in (
        ("small model alone", "slm"),
        ("**and a selector, nobody asked**", None),
        ("and at most 2 questions to the large model", "hybrid_2"),
        ("large model asked at every unsure token", "llm_select"),
        ("large model alone", "llm"),
    ):
        cells = [each["report"]["rows"][row or PAIRS[name][1]] for name, each in stored.items()]
        lines.append(f"| {label} | {' | '.join(_gain(cell, alone=row == 'llm') for cell in cells)} |")
    asked = [
        "{n} {what} (selector: {kind}; {hardware}, commit {commit}, {date})".format(
            n=each["report"]["n"], what=TASKS[each["report"]["task"]][1], kind=PAIRS[name][1], **each["made"]
        )
        for name, each in stored.items()
    ]
    note = (
        "Gap closed: share of the accuracy gap between the small and the large model that is recovered. "
        "Harm: share of the small model's right answers that become wrong. "
    )
    return "\n".join([*lines, "", f"{note}{'; '.join(asked)}. Made by `s2t eval`."])


def _gain(row: dict[str, Any], *, alone: bool) -> str:
    low, high = row["ci95"]
    questions = "-" if alone else f"{row['llm_calls']:.1f}"
    shares = f"{share(row['gap_closed'], 0)} | {questions} | {share(row['broken'])}"
    return f"{row['accuracy']:.1%} ({low:.0%} to {high:.0%}) | {shares}"


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


def beyond(stored: dict[str, dict[str, Any]]) -> str:
    """What each model and selector gets right where training ends."""
    rows = ("slm", "maj8", *KINDS, "published", "hybrid_2", "llm_select", "llm")
    lines = [
        f"| problems with | {' | '.join(NAMES.get(row, '**selector + 2 LLM picks**') for row in rows)} | gap closed |"
    ]
    lines.append("|---" * (len(rows) + 2) + "|")
    for name, each in stored.items():
        found = each["report"]["rows"]
        told = [f"{found[row]['accuracy']:.1%}" for row in rows]
        lines.append(f"| {BEYOND[name]} | {' | '.join(told)} | {share(found['head']['gap_closed'])} |")
    reports = [each["report"] for each in stored.values()]
    sizes = {(report["n"], report["seed"]) for report in reports}
    what = "; ".join(f"{n} problems each, seed {seed}" for n, seed in sorted(sizes))
    widest = max(high - low for report in reports for low, high in (row["ci95"] for row in report["rows"].values()))
    commits = ", ".join(sorted({each["made"]["commit"] for each in stored.values()}))
    tasks = ", ".join(f"`--task {name.removeprefix('demo_')}`" for name in stored)
    note = f"{what}; 95% intervals are at most {widest:.0%} wide. Gap closed: by the head. Commit {commits}, {tasks}."
    return "\n".join([*lines, "", note])


def trainings(reports: dict[str, dict[str, Any]], made: dict[str, Any]) -> str:
    """The same problems with selectors of several trainings."""
    rows = (*KINDS, "published", "hybrid_2", "llm")
    heads = ("selectors", *(NAMES.get(row, "selector + at most 2 LLM picks") for row in rows))
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, report in reports.items():
        cells = (report["rows"][row] for row in rows)
        told = " | ".join(f"{cell['accuracy']:.1%}, harm {share(cell['broken'])}" for cell in cells)
        lines.append(f"| {name} | {told} |")
    report = next(iter(reports.values()))
    what = f"{report['n']} held-out problems, seed {report['seed']}"
    return "\n".join([*lines, "", f"{what}; {made['hardware']}, commit {made['commit']}, {made['date']}."])


def training(report: dict[str, Any], made: dict[str, Any]) -> str:
    """The figures of ``s2t bench train --json``."""
    ours, theirs = (report["groups_per_s"][name] for name in ("one_pass", "published"))
    lines = ["| labelled groups per second | one pass | published way | ratio | wanted |", "|---|---|---|---|---|"]
    lines.append(
        f"| {report['shape']} shape, {report['prefix']} tokens of prefix, {report['groups']} groups of {report['k']} "
        f"| {ours:.3g} | {theirs:.3g} | {report['ratio']:.0f}x | at least {report['target']:.0f}x |"
    )
    where = f"{made['hardware']}, torch {report['torch']}, commit {made['commit']}, {made['date']}"
    return "\n".join([*lines, "", f"{where}. Made by `s2t bench train`."])


def speed(report: dict[str, Any], made: dict[str, Any]) -> str:
    """The tables of ``s2t bench decode --json``: ms a token, first tokens and memory, targets met or missed."""
    lines = [*per_token(report), "", *through_chat(report), *first_tokens(report), "", *concurrent(report), ""]
    lines += judged(targets(report))
    return "\n".join([*lines, "", SPEED_NOTE.format(**report), "", _made_by(report, made, "s2t bench decode")])


SPEED_NOTE = (
    "`@r`: the selector runs at that share of the steps. `published`: the paper's scheme, which reads the prefix again "
    "for every candidate; its measured selection time is added to our step time, and rates that were not run are "
    "interpolated in the same way. `maj8`: per token of eight samples. Over several prefixes, a target's worst figure "
    "counts. The 0.5B shape has random weights (speed does not depend on them). Not covered: {not_measured}."
)


def gpu(report: dict[str, Any], made: dict[str, Any]) -> str:
    """The tables of ``s2t bench gpu --json``: ms a token, targets met or missed, concurrency, what was checked."""
    parts = _gpu_parts(report)
    lines = [*per_token(parts), "", *judged(_gpu_targets(report), ("tokens and scores as on the CPU, in fp32", report))]
    lines += ["", *first_tokens(parts), "", *concurrent(parts)]
    seconds = sum(part["seconds"] for part in report["parts"].values())
    note = (
        f"Random weights. A share of 1 is a token in the time in which a copy on the device moves as many bytes as the "
        f"weights have. Over several prefixes, a target's worst figure counts. The whole run took {seconds:.0f} s; the "
        "first token after the first prefix includes everything that is captured and compiled once."
    )
    return "\n".join([*lines, "", note, "", _made_by(report, made, "s2t bench gpu --json")])


def speed_brief(stored: dict[str, dict[str, Any]]) -> str:
    """What a token takes after a thousand, on a CPU and on a GPU, and how many targets were missed."""
    (cpu, made_cpu), (device, made_device) = ((each["report"], each["made"]) for each in stored.values())
    every = (*cpu["decode"], *_gpu_parts(device)["decode"])
    lines = per_token({"decode": [part for part in every if 800 <= part["prefix"] <= 1100]}, SHORT)
    on_cpu, on_gpu = _made_by(cpu, made_cpu, "s2t bench decode"), _made_by(device, made_device, "s2t bench gpu --json")
    lines += ["", f"{missed(targets(cpu))} {on_cpu}", "", f"{missed(_gpu_targets(device))} {on_gpu}"]
    return "\n".join(lines)


def missed(found: dict[str, Verdict]) -> str:
    """How many targets were missed, of how many."""
    return f"**{sum(not each['met'] for each in found.values())} of {len(found)} targets missed**:"


def _gpu_parts(report: dict[str, Any]) -> dict[str, Any]:
    return {name: part["found"] for name, part in report["parts"].items()}


def _gpu_targets(report: dict[str, Any]) -> dict[str, Verdict]:
    parts = _gpu_parts(report)
    model = parts["turns"][0]["model"]
    shares = {prefix: each["share_of_copy"] for prefix, each in report["memory_limit"].items()}
    return {
        **{
            f"{model}: share of the memory's speed, after {prefix} tokens": at_least(0.5, share)
            for prefix, share in shares.items()
        },
        **targets_of(model, parts),
    }


def _made_by(report: dict[str, Any], made: dict[str, Any], command: str) -> str:
    return f"{made['hardware']}, torch {report['torch']}, commit {made['commit']}, {made['date']}. Made by `{command}`."


def judged(found: dict[str, Verdict], checked: tuple[str, dict[str, Any]] | None = None) -> list[str]:
    """What was wanted, found, and met: a miss is to be seen."""
    lines = ["| target | wanted | figure | met |", "|---|---|---|---|"]
    if checked is not None:
        what, report = checked
        said = "yes" if report["correct"] else "no"
        lines.append(f"| {what} | yes | {said} | {met(report['correct'])} |")
    for name, each in found.items():
        lines.append(f"| {name} | {each['wanted']} | {each['figure']:.4g} | {met(each['met'])} |")
    return lines


def met(good: bool) -> str:
    """A miss is bold."""
    return "yes" if good else "**no**"


SHORT = ("generate", "engine", "head@0.1", "activated@0.01", "activated@0.1", "published@0.1")
ALL = (
    "generate",
    "engine",
    "head@0.01",
    "head@0.1",
    "activated@0.01",
    "activated@0.1",
    "published@0.01",
    "published@0.1",
)


def per_token(report: dict[str, Any], names: tuple[str, ...] = ALL) -> list[str]:
    """ms a token of each row, after each prefix."""
    heads = " | ".join(
        {"generate": "transformers' `generate`", "engine": "ours, greedy"}.get(name, name) for name in names
    )
    lines = [f"| ms a token (over our greedy) | {heads} |", "|---" * (len(names) + 1) + "|"]
    for part in report["decode"]:
        cells = [part["rows"][name] for name in names]
        told = " | ".join(f"{figure(row['ms_per_token'])} ({row['over_greedy']:.2f}x)" for row in cells)
        lines.append(f"| {part['model']}, {part['dtype']}, after {part['prefix']} tokens | {told} |")
    return lines


def through_chat(report: dict[str, Any]) -> list[str]:
    """ms a token through the chat model, and over the bare engine; none in results stored before that was measured."""
    if "chat" not in report:
        return []
    lines = ["| ms a token (over the bare engine) | " + " | ".join(CHAT) + " |", "|---" * (len(CHAT) + 1) + "|"]
    for part in report["chat"]:
        cells = [part["rows"][name] for name in CHAT]
        told = " | ".join(f"{figure(row['ms_per_token'])} ({row['over_engine']:.2f}x)" for row in cells)
        lines.append(f"| {part['model']}, after {part['prompt_tokens']['plain']} tokens | {told} |")
    return [*lines, ""]


TOKENIZER_ROWS = {
    "read": "LLM tokens read, tree included",
    "tree": "of these, tokens of the tree",
    "same_read": "LLM tokens read with the same tokenizer",
    "cpu_ms": "CPU ms",
    "same_cpu_ms": "CPU ms with the same tokenizer",
    "apart": "nats between the pick's log-probability and that by every path",
}
"""What a question by bytes takes, by its name in the report."""


def tokenizers(report: dict[str, Any], made: dict[str, Any]) -> str:
    """The table of ``s2t bench tokenizers --json``: a question by bytes beside one of the same tokenizer."""
    heads = (f"{report['later']} questions after the first of an answer", "mean", "median", "95%", "most")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for key, name in TOKENIZER_ROWS.items():
        lines.append(f"| {name} | {' | '.join(f'{report[key][at]:.3g}' for at in ('mean', 'median', 'p95', 'max'))} |")
    lines += [
        "",
        f"CPU time of a question: {report['ratio']:.2f} times that of one with the same tokenizer, on the same weights"
        f" and texts. {report['agree']} of {report['compared']} picks are those of every path, where a token may end"
        f" after every byte. Over HTTP {report['served_exactly']} of {report['questions']} questions would be"
        f" exact in one request; approximate, by one prompt and 128 ids, {report['served_agree']} of"
        f" {report['served_asked']} picks are the same. SLM {report['slm']}, LLM {report['llm']}, {report['problems']}"
        f" word problems. {made['hardware']}, one thread, commit {made['commit']}, {made['date']}. Made by"
        f" `{made['command']}`.",
    ]
    return "\n".join(lines)


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


def pacing(report: dict[str, Any], made: dict[str, Any]) -> str:
    """The table of ``s2t bench pacing --json``."""
    heads = ("budget, in selections", "uncertainty: first come", "paced", "picks changed: first come", "paced")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in report["shares"]:
        cells = [row[gain][how] for gain in ("uncertainty", "changed") for how in ("first_come", "paced")]
        lines.append(f"| {row['budget']:.0%} | {' | '.join(share(cell, 0) for cell in cells)} |")
    what = (
        f"{report['selections']} selections of {report['problems']} held-out problems, seed {report['seed']}, trigger "
        f"at {report['nats']:g} nats; the LLM changed {report['changed']} of them; means over {report['orders']} orders"
    )
    return "\n".join([*lines, "", f"{what}. Commit {made['commit']}, {made['date']}. Made by `s2t bench pacing`."])


def first_tokens(report: dict[str, Any]) -> list[str]:
    """Time to the first token and the process's peak memory so far, after each prefix."""
    heads = ("ms to the first token", "generate", "engine", "engine, prompt seen before", "peak memory, MB")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for part in report["decode"]:
        theirs, ours = (part["rows"][name] for name in ("generate", "engine"))
        times = (theirs["first_token_cold_ms"], ours["first_token_cold_ms"], ours["first_token_warm_ms"])
        told = [figure(ms) for ms in times]
        lines.append(
            f"| {part['model']}, after {part['prefix']} tokens | {' | '.join(told)} | {part['peak_rss_mb']:.0f} |"
        )
    return lines


def concurrent(report: dict[str, Any]) -> list[str]:
    """Concurrent generations over the same ones in sequence."""
    heads = ["concurrent generations", "tokens/s", "speed-up", "without prompts", "ms between tokens: median / p99"]
    bound = any("bound" in each for each in report["loops"])
    heads += ["share of the bound"] * bound
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    kinds = [("uncached prompts", each) for each in report["parallel"]]
    kinds += [("agent loops of {turns} turns, one system prompt".format(**each), each) for each in report["loops"]]
    for kind, each in kinds:
        gaps = f"{figure(each['gap_ms_median'])} / {figure(each['gap_ms_p99'])}"
        ratios = f"{each['ratio']:.2f}x | {each['step_ratio']:.2f}x"
        per_second = figure(each["together_tokens_per_s"])
        told = f" {each['bound']['share']:.0%} |" if "bound" in each else " - |" * bound
        lines.append(f"| {each['model']}, {each['at_once']} {kind} | {per_second} | {ratios} | {gaps} |{told}")
    return lines


def figure(value: float) -> str:
    """Three digits, and no exponents."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def share(value: float | None, digits: int = 1) -> str:
    """A share in per cent; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}%}"


def sections() -> dict[str, str]:
    """What stands between each pair of markers, from the results that are there."""
    of_one: dict[str, tuple[str, Callable[[Any, dict[str, Any]], str]]] = {
        "eval": ("demo_eval", evaluation),
        "real": ("real_eval", real),
        "real_pipeline": ("real_pipeline", real),
        "real_multiple": ("real_multiple", real),
        "real_svamp": ("real_svamp", real),
        "hard": ("demo_hard", evaluation),
        "again": ("demo_again", evaluation),
        "trainings": ("demo_trainings", trainings),
        "training": ("train", training),
        "engines": ("engines", engines_report.markdown),
        "real_gguf": ("real_gguf_eval", real),
        "real_gemma": ("real_gemma_eval", real),
        "escalation": ("escalate", escalation),
        "tokenizers": ("tokenizers", tokenizers),
        "pacing": ("pacing", pacing),
        "against": ("against", against.markdown),
        "served": ("served", served.markdown),
        "speed": ("decode", speed),
        "speed_avx2": ("decode_avx2", speed),
        "gpu": ("gpu", gpu),
    }
    of_several = {
        "harm": (list(HARM), harm),
        "beyond": (list(BEYOND), beyond),
        "gains": (list(PAIRS), gains),
        "speed_brief": (["decode", "gpu"], speed_brief),
    }
    found = {}
    for section, (name, write) in of_one.items():
        if (stored := result(name)) is not None:
            found[section] = write(stored["report"], stored["made"])
    for section, (names, write_all) in of_several.items():
        several = {name: stored for name in names if (stored := result(name)) is not None}
        if len(several) == len(names):
            found[section] = write_all(several)
    return found


def result(name: str) -> dict[str, Any] | None:
    """A stored result, if it is there."""
    file = RESULTS / f"{name}.json"
    stored: dict[str, Any] | None = json.loads(file.read_text()) if file.is_file() else None
    return stored


def filled(text: str) -> str:
    """A page with every section replaced by its present content."""
    for name, content in sections().items():
        pattern = rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)"
        told = content.replace("\\", r"\\")
        text = re.sub(pattern, rf"\g<1>{told}\n\g<2>", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
