"""Local sufficiency: where the small model is unsure, is the large model's token among its first few?

    python -m benchmarks.demo_pair.sufficiency s2t_agents/demo/weights/slm s2t_agents/demo/weights/llm --n 300 --json

The small model answers greedily; the large one reads the whole trajectory in one forward. Of the steps in the small
model's own turns, those with the highest entropy are looked at: Hit@k is the share of them at which the large model's
first choice is among the small model's first k.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from s2t_agents.demo.problem import Message, Problem, tool_call_message, tool_result_message
from s2t_agents.demo.world import generate

from . import tokenizer as tokenizers
from .check import Attempt, solve
from .corpus import Encoder, Row, cut, pad

KS = (1, 2, 4, 8)
RATES = (0.01, 0.05, 0.1)


def trajectory(problem: Problem, outcome: Attempt) -> list[Message]:
    """The conversation that the small model made of `problem`."""
    messages = list(problem.prompt)
    if outcome.call_right:
        assert problem.expected_call is not None
        messages += [tool_call_message(problem.expected_call), tool_result_message(problem.expected_call)]
    return [*messages, {"role": "assistant", "content": outcome.text}]


@torch.inference_mode()
def compare(slm: Any, llm: Any, rows: Sequence[Row], filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Per step of the small model's turns: its entropy in nats, N, and its rank of the large model's token, N."""
    entropies, ranks = [], []
    rows = sorted(rows, key=lambda row: len(row[0]))
    for low, high in cut(rows, 8192):
        batch = pad(rows[low:high], filler)
        wanted = batch.weights[:, 1:] > 0
        small = slm(batch.ids[:, :-1]).logits[wanted].float().log_softmax(-1)
        best = llm(batch.ids[:, :-1]).logits[wanted].argmax(-1, keepdim=True)
        entropies.append(-(small.exp() * small).sum(-1))
        ranks.append((small > small.gather(-1, best)).sum(-1))
    return torch.cat(entropies), torch.cat(ranks)


def hits(entropies: torch.Tensor, ranks: torch.Tensor) -> list[dict[str, float]]:
    """Hit@k at the steps of highest entropy, for each rate."""
    order = entropies.argsort(descending=True)
    table = []
    for rate in RATES:
        chosen = order[: max(1, round(rate * len(order)))]
        row = {"rate": rate, "steps": float(len(chosen)), "entropy_from": float(entropies[chosen[-1]])}
        table.append(row | {f"hit@{k}": float((ranks[chosen] < k).float().mean()) for k in KS})
    return table


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Local sufficiency of the demo pair.")
    parser.add_argument("slm", type=Path)
    parser.add_argument("llm", type=Path)
    parser.add_argument("--n", type=int, default=300, help="problems, word and tool half and half")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    slm, llm = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
        for folder in (given.slm, given.llm)
    )
    tokenizer = tokenizers.load(given.slm)
    problems = [generate(given.seed + i) for i in range(given.n)]
    encode = Encoder(tokenizer)
    pairs = zip(problems, solve(slm, tokenizer, problems), strict=True)
    rows = [encode(trajectory(p, outcome), p.tools, 0.0) for p, outcome in pairs]
    entropies, ranks = compare(slm, llm, rows, encode.pad)
    table = hits(entropies, ranks)
    agree = float((ranks == 0).float().mean())
    if given.json:
        print(json.dumps({"steps": len(ranks), "agreement": agree, "hits": table}))
        return
    shown = Table("rate", *list(table[0])[1:], title=f"{len(ranks)} steps, first choices agree at {agree:.1%}")
    for row in table:
        shown.add_row(f"{row['rate']:.0%}", str(int(row["steps"])), *[f"{row[k]:.3f}" for k in list(row)[2:]])
    Console().print(shown)


if __name__ == "__main__":
    main()
