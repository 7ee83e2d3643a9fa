"""A demo run for people: the conversation, every changed token marked, and where the money and the time went."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, ToolMessage
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..types import Picker, Step
from .agent import AGENT, DEVICE_PRICE, LLM_PRICE, DemoRun

COLOURS: dict[Picker, str] = {"selector": "black on green", "llm": "black on yellow"}


def show(run: DemoRun, console: Console) -> None:
    """Print a run."""
    tokenizer = run.model.engine.slm.tokenizer
    for message in run.messages:
        console.print(_panel(message, run, tokenizer))
    verdict = Text(" right ", "black on green") if run.correct else Text(" wrong ", "white on red")
    console.print(Text.assemble("expected ", (run.problem.expected, "bold"), "  ", verdict))
    console.print(_numbers(run.sums()))
    console.print(
        f"[dim]Prices are examples: this machine at ${DEVICE_PRICE.usd_per_hour}/h, the LLM as if hosted at "
        f"${LLM_PRICE.input_usd_per_mtok} / ${LLM_PRICE.output_usd_per_mtok} per million tokens in / out.[/dim]"
    )


def _panel(message: BaseMessage, run: DemoRun, tokenizer: Any) -> Panel:
    if isinstance(message, AIMessage):
        steps = run.steps[message.response_metadata["s2t"]["trace_id"]]
        changed = [step for step in steps if step.flipped]
        body = Group(_marked(steps, tokenizer), *_changes(changed, tokenizer))
        return Panel(body, title=f"{AGENT} (small model)", title_align="left", border_style="cyan")
    if isinstance(message, ToolMessage):
        return Panel(Text(str(message.text)), title=f"tool {message.name}", title_align="left", border_style="magenta")
    return Panel(Text(str(message.text)), title=message.type, title_align="left")


def _marked(steps: Sequence[Step], tokenizer: Any) -> Text:
    """The answer as generated, tool call and all, with the changed tokens in the colour of who changed them."""
    text = Text()
    for step in steps:
        if step.token_id == tokenizer.eos_token_id:
            continue
        text.append(tokenizer.decode([step.token_id]), COLOURS[step.picked_by] if step.flipped else "")
    return text


def _changes(changed: Sequence[Step], tokenizer: Any) -> Iterator[Text]:
    for step in changed:
        wanted, chosen = (
            json.dumps(tokenizer.decode([t]), ensure_ascii=False) for t in (step.wanted_id, step.token_id)
        )
        who = Text(f" {step.picked_by} ", COLOURS[step.picked_by])
        yield Text.assemble(("  token ", "dim"), (f"{step.index}: ", "dim"), f"{wanted} → {chosen} ", who)


def _numbers(s2t: dict[str, Any]) -> Table:
    table = Table(title="This run", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("tokens", str(s2t["tokens"]), "critical steps", str(s2t["triggers"]))
    table.add_row("selections", str(s2t["selections"]), "flips", str(s2t["flips"]))
    table.add_row("escalations", str(s2t["escalations"]), "refused by the budget", str(s2t["refused"]))
    cost, latency = s2t["cost_usd"], s2t["latency_ms"]
    for part in ("local", "llm", "total"):
        table.add_row(
            f"cost {part}", _usd(cost[part]), *(("degraded", str(s2t["degraded"])) if part == "local" else ())
        )
    split = " · ".join(f"{verb} {latency[verb]:.0f}" for verb in ("propose", "select", "escalate", "total"))
    table.add_row("latency ms", split)
    left = (s2t["budget"] or {}).get("left", {})
    table.add_row("budget left", ", ".join(f"{value} {unit}" for unit, value in left.items()) or "no limit")
    return table


def _usd(value: float | None) -> str:
    return "unknown" if value is None else f"${value:.7f}"
