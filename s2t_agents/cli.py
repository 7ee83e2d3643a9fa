"""``s2t``: the command line. Tables for people, ``--json`` for programs, one clear line on bad input."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.markup import escape

from . import __version__
from .errors import ConfigError, S2TError
from .training.commands import app as training

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

app = typer.Typer(no_args_is_help=True, add_completion=False, help="A small local model, corrected where it is unsure.")
app.add_typer(training)  # collect, train, calibrate, eval, probe, pipeline
bench = typer.Typer(no_args_is_help=True, help="Run benchmarks against a baseline.")
app.add_typer(bench, name="bench")
console = Console()

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


class TrainShape(StrEnum):
    """``bench.train.SHAPES`` by name, known without loading torch."""

    HALF_BILLION = "0.5b"
    TINY = "tiny"


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"s2t-agents {__version__}")
        raise typer.Exit


@app.callback()
def _s2t(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """A small local model, corrected where it is unsure, within a budget that holds."""


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="Another seed, another problem that training never saw.")] = 35,
    budget_escalations: Annotated[int, typer.Option(min=0, help="How often the large model may be asked.")] = 3,
    no_selector: Annotated[bool, typer.Option("--no-selector", help="Run without the selector.")] = False,
    no_llm: Annotated[bool, typer.Option("--no-llm", help="Never load the large model.")] = False,
    as_json: AsJson = False,
) -> None:
    """Watch a LangGraph agent on the bundled pair call a tool, reason, and stay inside its budget."""
    import torch

    from .demo.agent import run_demo
    from .demo.show import show
    from .demo.world import demo_question

    torch.set_num_threads(1)  # so small a model is slower on more, and waits for busy cores
    run = run_demo(demo_question(seed), escalations=budget_escalations, selector=not no_selector, llm=not no_llm)
    if as_json:
        typer.echo(json.dumps(run.as_json(), ensure_ascii=False))
    else:
        show(run, console)


@app.command()
def chat(
    model: Annotated[str, typer.Option(help="Directory or hub id of a chat model; s2t-demo is bundled.")] = "s2t-demo",
    selector: Annotated[str | None, typer.Option(help="Directory of its selector; s2t-demo is bundled.")] = None,
    llm: Annotated[str | None, typer.Option(help="Directory or hub id of a larger model to ask.")] = None,
    escalations: Annotated[int, typer.Option(min=0, help="How often it may be asked in this chat.")] = 10,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
) -> None:
    """Talk to a local model; an empty line or end of input ends it."""
    from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage

    from .budget import Budget
    from .chat.chat_model import ChatS2T

    chat_model = ChatS2T(model=model, selector=selector, escalation=llm, budget=Budget(escalations=escalations))
    _ = chat_model.engine  # loads the weights: a wrong name is told before anybody types
    history: list[BaseMessage] = [SystemMessage(system)] if system else []
    while line := _ask():
        history.append(HumanMessage(line))
        said = ""
        for chunk in chat_model.stream(history):
            said += chunk.text
            typer.echo(chunk.text, nl=False)
        typer.echo()
        history.append(AIMessage(said))


@app.command()
def report(
    ledger: Annotated[Path, typer.Argument(help="A ledger's file: .jsonl, .db or .sqlite.")],
    by: Annotated[str, typer.Option(help="agent, thread, run or day.")] = "agent",
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values.")] = False,
) -> None:
    """What each agent cost, in money and in time."""
    from .ledger.report import parts

    if as_json and as_csv:
        raise ConfigError("--json and --csv were both given.", hint="Take one.")
    for part in parts(ledger, by, "json" if as_json else "csv" if as_csv else "table"):  # type: ignore[arg-type]
        typer.echo(part, nl=False)


@bench.command("budget")
def bench_budget(
    seconds: Annotated[float, typer.Option(min=0.1, help="Per store and thread count.")] = 1.0, as_json: AsJson = False
) -> None:
    """Reserve + settle pairs per second on every budget store."""
    from .bench.budget import run, table

    _show(run(seconds), as_json, table)


@bench.command("escalate")
def bench_escalate(
    n: Annotated[int, typer.Option(min=1, help="Held-out problems.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first problem.")] = 0,
    rate: Annotated[float, typer.Option(min=0.001, max=1, help="Share of tokens at which the LLM is asked.")] = 0.05,
    as_json: AsJson = False,
) -> None:
    """LLM forwards, tokens and time per answer, beside an LLM that reads along on every token."""
    from .bench.escalate import run, table

    _show(run(n, seed, rate=rate), as_json, table)


@bench.command("pacing")
def bench_pacing(
    n: Annotated[int, typer.Option(min=1, help="Held-out problems.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first problem.")] = 0,
    as_json: AsJson = False,
) -> None:
    """What pacing a budget gains, beside first come, first served, and hindsight."""
    from .bench.pacing import run, table

    _show(run(n, seed), as_json, table)


@bench.command("decode")
def bench_decode(
    quick: Annotated[bool, typer.Option("--quick", help="Show that it runs; measures nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Time per token beside transformers and the published scheme, concurrent generations, turns. 15 to 30 minutes."""
    from .bench.speed import run, table

    _show(run(Console(stderr=True).print, quick=quick), as_json, table)


@bench.command("train")
def bench_train(
    shape: Annotated[TrainShape, typer.Option(help="Of the model (random weights).")] = TrainShape.HALF_BILLION,
    prefix: Annotated[int, typer.Option(min=8, help="Tokens before the first group.")] = 512,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions of each measurement; the median counts.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Labelled groups per second: one pass over a trajectory beside the published way."""
    from .bench.train import run, table

    _show(run(shape=shape.value, prefix=prefix, repeats=repeats), as_json, table)


def _show(result: dict[str, Any], as_json: bool, table: Callable[[dict[str, Any]], RenderableType]) -> None:
    if as_json:
        typer.echo(json.dumps(result))
    else:
        console.print(table(result))


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def main() -> None:
    """Entry point: our own errors become one line and exit code 2."""
    try:
        app()
    except ModuleNotFoundError as error:
        extra = {"langchain": "agents", "langgraph": "agents", "matplotlib": "train", "redis": "redis"}
        if (package := (error.name or "").split(".")[0]) not in extra:
            raise
        typer.echo(f"s2t: this needs {package}: pip install 's2t-agents[{extra[package]}]'", err=True)
        raise SystemExit(2) from error
    except S2TError as error:
        Console(stderr=True, soft_wrap=True).print(f"[red]s2t:[/red] {escape(str(error))}", highlight=False)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
