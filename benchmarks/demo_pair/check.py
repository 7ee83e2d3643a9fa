"""How well does a model of the pair do on problems that training never saw? Plain greedy decoding, no selector.

python -m benchmarks.demo_pair.check s2t_agents/demo/weights/slm s2t_agents/demo/weights/llm --n 200 --json
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from s2t_agents.demo.problem import (
    Kind,
    Message,
    Problem,
    Split,
    grade,
    tool_call_message,
    tool_result_message,
)
from s2t_agents.demo.world import generate
from s2t_agents.intervals import wilson

from . import tokenizer as tokenizers

CALL = re.compile(r"\s*<tool_call>\n(.*)\n</tool_call>\s*", re.DOTALL)
NEW_TOKENS = 128


@dataclass(frozen=True)
class Attempt:
    """What became of one problem: the final text, whether it is right, and whether the call was (None: none needed)."""

    text: str
    correct: bool
    call_right: bool | None


@dataclass(frozen=True)
class Share:
    """`hits` of `count`, with the 95% Wilson interval."""

    hits: int
    count: int

    @property
    def value(self) -> float:
        """The share itself; 0 of 0 is not a number."""
        return self.hits / self.count if self.count else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The Wilson score interval at 95%."""
        return wilson(self.hits, self.count) if self.count else (math.nan, math.nan)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.1%} ({low:.1%} - {high:.1%})" if self.count else "-"


@torch.inference_mode()
def complete(model: Any, tokenizer: Any, prompts: Sequence[str], batch: int = 50) -> list[str]:
    """Greedy continuations of rendered prompts, without the end-of-turn token; tool call tags are kept."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    for low in range(0, len(order), batch):
        chosen = order[low : low + batch]
        inputs = tokenizer([prompts[i] for i in chosen], return_tensors="pt", padding=True, padding_side="left")
        width = inputs["input_ids"].shape[1]
        out = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
        )
        for row, i in zip(out, chosen, strict=True):
            texts[i] = tokenizer.decode(row[width:]).split("<|im_end|>")[0].replace("<|endoftext|>", "")
    return texts


def solve(model: Any, tokenizer: Any, problems: Sequence[Problem]) -> list[Attempt]:
    """Let the model answer, with the tool's result after a right call; a wrong call ends a problem, unsolved."""

    def render(problem: Problem, messages: Sequence[Message]) -> str:
        tools = list(problem.tools) or None
        return str(
            tokenizer.apply_chat_template(list(messages), tools=tools, add_generation_prompt=True, tokenize=False)
        )

    first = complete(model, tokenizer, [render(p, p.prompt) for p in problems])
    outcomes: dict[int, Attempt] = {}
    second: dict[int, str] = {}
    for at, (problem, text) in enumerate(zip(problems, first, strict=True)):
        if problem.expected_call is None:
            outcomes[at] = Attempt(text, grade(text, problem), None)
        elif not _right_call(text, problem):
            outcomes[at] = Attempt(text, False, False)
        else:
            call = problem.expected_call
            second[at] = render(problem, [*problem.prompt, tool_call_message(call), tool_result_message(call)])
    for at, text in zip(second, complete(model, tokenizer, list(second.values())), strict=True):
        outcomes[at] = Attempt(text, grade(text, problems[at]), True)
    return [outcomes[at] for at in range(len(problems))]


def _right_call(text: str, problem: Problem) -> bool:
    found = CALL.fullmatch(text)
    try:
        call = json.loads(found.group(1)) if found else None
    except ValueError:
        return False
    return (
        isinstance(call, dict)
        and set(call) == {"name", "arguments"}
        and isinstance(call["arguments"], dict)
        and problem.is_expected_call(call["name"], call["arguments"])
    )


def measure(model: Any, tokenizer: Any, kinds: Sequence[Kind], split: Split, seed: int, n: int) -> list[dict[str, Any]]:
    """One row per kind: n problems from `seed` on, accuracy and exactness of calls."""
    rows = []
    for kind in kinds:
        began = time.perf_counter()
        problems = [generate(seed + i, split, kind) for i in range(n)]
        outcomes = solve(model, tokenizer, problems)
        calls = [o.call_right for o in outcomes if o.call_right is not None]
        rows.append(
            {
                "kind": kind,
                "correct": Share(sum(o.correct for o in outcomes), n),
                "calls": Share(sum(calls), len(calls)),
                "seconds": round(time.perf_counter() - began, 2),
                "misses": [
                    {"question": p.question, "text": o.text, "expected": p.expected}
                    for p, o in zip(problems, outcomes, strict=True)
                    if not o.correct
                ],
            }
        )
    return rows


def _as_json(row: dict[str, Any]) -> dict[str, Any]:
    shares = {k: {**asdict(row[k]), "value": row[k].value, "ci95": row[k].interval} for k in ("correct", "calls")}
    if not row["calls"].count:
        shares["calls"] = {"hits": 0, "count": 0, "value": None, "ci95": None}
    return {k: v for k, v in {**row, **shares}.items() if k != "misses"}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Accuracy of the demo pair on fresh problems, greedy.")
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--n", type=int, default=200, help="problems of each kind")
    parser.add_argument("--seed", type=int, default=0, help="first problem's seed")
    parser.add_argument("--split", choices=get_args(Split), default="heldout")
    parser.add_argument("--kinds", default="word,tool,call,talk", help="separated by commas")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--misses", type=int, default=0, help="show so many wrong answers of each kind")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.n < 1:
        parser.error("--n must be at least 1")
    torch.set_num_threads(given.threads)
    kinds = given.kinds.split(",")
    if strange := set(kinds) - set(get_args(Kind)):
        parser.error(f"unknown kinds: {', '.join(sorted(strange))}")
    table = Table("model", "kind", "right answers (95%)", "exact tool calls (95%)", "seconds")
    report: dict[str, Any] = {"split": given.split, "seed": given.seed, "n": given.n, "models": {}}
    for folder in given.folders:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
        rows = measure(model, tokenizers.load(folder), kinds, given.split, given.seed, given.n)
        report["models"][folder.name] = [_as_json(row) for row in rows]
        for row in rows:
            table.add_row(folder.name, row["kind"], str(row["correct"]), str(row["calls"]), str(row["seconds"]))
            for miss in row["misses"][: given.misses]:
                Console(stderr=True).print(miss, markup=False)
    if given.json:
        print(json.dumps(report))
    else:
        Console().print(table)


if __name__ == "__main__":
    main()
