"""``s2t``: the command line, a function for each command; ``chat`` is a conversation in the terminal, ``bench`` hands
on to ``benchmarks/``. Tables for people, ``--json`` for programs, one clear line on bad input.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from . import __version__
from .errors import ConfigError, S2TError
from .training.commands import app as training

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

app = typer.Typer(no_args_is_help=True, add_completion=False, help="A small local model, corrected where it is unsure.")
app.add_typer(training)  # collect, train, calibrate, eval, probe, pipeline
console = Console()

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Model = Annotated[
    str, typer.Option(help="The SLM: directory, GGUF file, hub id, or vllm://host:port/name; s2t-demo is bundled.")
]
Selector = Annotated[str | None, typer.Option(help="Directory of its selector; s2t-demo is bundled.")]
LLM = Annotated[
    str | None, typer.Option(help="The larger model to ask: directory, GGUF file, hub id, or URL#name of a server's.")
]


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
    escalations: Annotated[
        int,
        typer.Option("--escalations", "--budget-escalations", min=0, help="How often the large model may be asked."),
    ] = 3,
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
    run = run_demo(demo_question(seed), escalations=escalations, selector=not no_selector, llm=not no_llm)
    if as_json:
        typer.echo(json.dumps(run.as_json(), ensure_ascii=False))
    else:
        show(run, console)


@app.command()
def chat(
    model: Model = "s2t-demo",
    selector: Selector = None,
    llm: LLM = None,
    escalations: Annotated[int, typer.Option(min=0, help="How often it may be asked in this chat.")] = 10,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
) -> None:
    """Talk to a local model; an empty line or end of input ends it."""
    from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage

    from .budget import Budget
    from .chat.chat_model import ChatS2T

    chat_model = ChatS2T(model=model, selector=selector, escalation=llm, budget=Budget(escalations=escalations))
    _ = chat_model.engine  # loads the weights: a wrong name fails before the first prompt
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
def doctor(
    model: Model = "s2t-demo",
    llm: LLM = "s2t-demo-llm",
    as_json: AsJson = False,
) -> None:
    """What an SLM and an LLM can do together: tokenizers, how candidates are scored, cost of a question, price."""
    from .chat.doctor import diagnosed, lines
    from .llms.front import llm_of

    found = diagnosed(model, llm_of(llm))
    typer.echo(json.dumps(found.as_json(), ensure_ascii=False) if as_json else "\n".join(lines(found)))
    if not found.works:
        raise typer.Exit(1)


@app.command()
def serve(
    model: Model = "s2t-demo",
    selector: Selector = None,
    llm: LLM = None,
    name: Annotated[list[str] | None, typer.Option(help="What clients may call the model; repeatable.")] = None,
    host: Annotated[str, typer.Option(help="An address; others than loopback need --keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    keys: Annotated[Path | None, typer.Option(help="Key file: agents, hashes of their keys, budgets.")] = None,
    usd: Annotated[str | None, typer.Option(help="What all agents together may spend, in US dollars.")] = None,
    escalations: Annotated[int | None, typer.Option(min=0, help="How often they may ask the larger model.")] = None,
    llm_price: Annotated[
        str | None, typer.Option(help="USD per million tokens that the larger model reads / writes, as 0.50/1.50.")
    ] = None,
    device_price: Annotated[str | None, typer.Option(help="What an hour of this machine costs, in USD.")] = None,
    budgets: Annotated[Path | None, typer.Option(help="SQLite file that keeps what was spent.")] = None,
    ledger: Annotated[Path | None, typer.Option(help="Ledger file: .jsonl, .db or .sqlite.")] = None,
    shadow: Annotated[
        bool, typer.Option("--shadow", help="Answer with the small model alone; record what would have changed.")
    ] = False,
    record_steps: Annotated[bool, typer.Option(help="Keep every step in the ledger, for s2t trace.")] = False,
    record_text: Annotated[
        bool, typer.Option(help="Keep the text of prompts and steps, too; implies --record-steps.")
    ] = False,
    trace: Annotated[
        bool, typer.Option("--trace", help="Show the ledger at /trace, live, to whoever may ask; a key shows its own.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Limit of an answer where a request sets none.")] = 512,
    running: Annotated[int, typer.Option(min=1, help="Answers generated at once.")] = 32,
    waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait behind them; more get 429.")] = 256,
) -> None:
    """Serve OpenAI's API: chat completions, completions, models."""
    from .server import serve as run
    from .server.setup import Setup

    chat_model, tenants = Setup(
        model=model,
        selector=selector,
        llm=llm,
        keys=keys,
        usd=usd,
        escalations=escalations,
        llm_price=llm_price,
        device_price=device_price,
        budgets=budgets,
        ledger=ledger,
        shadow=shadow,
        record_steps=record_steps,
        record_text=record_text,
        trace=trace,
        max_tokens=max_tokens,
        running=running,
        waiting=waiting,
    ).build()

    def print_address(host: str, port: int) -> None:
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        typer.echo(f"s2t serves OpenAI's API at {url}/v1" + (f", its trace at {url}/trace" if trace else ""))

    run(
        chat_model,
        host=host,
        port=port,
        tenants=tenants,
        names=name or (),
        trace=trace,
        on_loading=lambda: typer.echo(f"loading {model}", err=True),
        on_listening=print_address,
    )


@app.command()
def key(agent: Annotated[str, typer.Argument(help="Name of the agent that the key is for.")]) -> None:
    """Make a key for s2t serve and print its entry for the key file; the key itself is kept nowhere."""
    from .server.tenants import new_key

    made, line = new_key()
    typer.echo(f"key, shown this once:  {made}\n\nfor the key file:\n\n[agents.{json.dumps(agent)}]\nkeys = [{line!r}]")
    typer.echo('# budget = { usd = "5.00", escalations = 200, window = "day" }')


@app.command()
def report(
    ledger: Annotated[Path, typer.Argument(help="A ledger's file: .jsonl, .db or .sqlite.")],
    by: Annotated[Literal["agent", "thread", "run", "day"], typer.Option(help="What a row is.")] = "agent",
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values.")] = False,
) -> None:
    """What each agent cost, in money and in time."""
    from .ledger.report import report_parts

    if as_json and as_csv:
        raise ConfigError("--json and --csv were both given.", hint="Give one of them.")
    form: Literal["json", "csv", "table"] = "json" if as_json else "csv" if as_csv else "table"
    for part in report_parts(ledger, by, form):
        typer.echo(part, nl=False)


@app.command()
def trace(
    ledger: Annotated[Path, typer.Argument(help="A ledger's file: .jsonl, .db or .sqlite.")],
    out: Annotated[Path | None, typer.Option(help="The page; beside the ledger by default.")] = None,
    last: Annotated[int, typer.Option(min=1, help="Show so many answers, the newest.")] = 2000,
    agent: Annotated[str | None, typer.Option(help="Show this agent's and its parts' alone.")] = None,
    as_json: AsJson = False,
) -> None:
    """One HTML page of what each answer did: who picked which token, why, at what price, in what time."""
    from .trace import write_trace

    page = out or ledger.with_name(f"{ledger.name}.html")
    shown = write_trace(ledger, page, last=last, agent=agent)
    typer.echo(json.dumps({"page": str(page), "answers": shown}) if as_json else f"{page}: {shown:,} answers")


@app.command()
def audit(
    log: Annotated[Path, typer.Argument(help="JSON lines: OpenAI-style requests and answers, or LangSmith runs.")],
    model: Model = "s2t-demo",
    selector: Selector = None,
    asked: Annotated[
        str | None, typer.Option(help="Whose price a question has; by default each answer's model.")
    ] = None,
    answers: Annotated[int, typer.Option(min=1, help="Replay so many answers, a random sample.")] = 100,
    as_json: AsJson = False,
) -> None:
    """What this would have triggered, asked, cost and saved on a log that exists. Asks no LLM, sends nothing.

    Read are {"request": ..., "response": ...} with the bodies of chat completions, lines of OpenAI's batches,
    {"messages": [...]} that end with an answer, and runs exported from LangSmith. A sample of the answers is followed
    along the log, token by token, by the small model on this machine. What no log can say is listed with the figures:
    whether another token is a worse one, what would come after it, the time, the small model's own price.
    """
    from rich.progress import Progress

    from .audit import audit as run
    from .audit.show import show as show_audit

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("answers", total=None)
        found = run(
            log,
            model=model,
            selector=selector,
            asked=asked,
            answers=answers,
            on_progress=lambda done, of: progress.update(task, completed=done, total=of),
        )
    if as_json:
        typer.echo(json.dumps(found.as_json(), ensure_ascii=False))
    else:
        show_audit(found, console, model)


@app.command(
    add_help_option=False,  # its help is that of the benchmarks
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench(context: typer.Context) -> None:
    """Run benchmarks against a baseline: against, decode, engines, escalate, gpu, served, ... In a checkout only."""
    checkout = Path(__file__).parent.parent
    if not (checkout / "benchmarks" / "commands.py").is_file():
        raise ConfigError(
            f"s2t bench needs the folder benchmarks/ of the source repository, and {checkout} has none.",
            hint="Get a checkout of s2t-agents and install that: pip install -e '.[test]'.",
        )
    sys.path.insert(0, str(checkout))
    commands = import_module("benchmarks.commands")
    commands.app(context.args, prog_name="s2t bench")


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
        extra |= dict.fromkeys(("starlette", "uvicorn", "h11"), "server")
        if (package := (error.name or "").split(".")[0]) not in extra:
            raise
        typer.echo(f"s2t: this needs {package}: pip install 's2t-agents[{extra[package]}]'", err=True)
        raise SystemExit(2) from error
    except S2TError as error:
        Console(stderr=True, soft_wrap=True).print(f"[red]s2t:[/red] {escape(str(error))}", highlight=False)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
