"""``s2t collect | train | calibrate | eval | probe | pipeline``: one TOML file in, tables or JSON out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import S2TError

if TYPE_CHECKING:  # torch would make --help slow
    from .config import Kind, Part, Pipeline

app = typer.Typer(no_args_is_help=True, help="Train and measure selectors.")

BUNDLED = Path(__file__).parent.parent / "demo" / "selector.toml"

Config = Annotated[
    Path, typer.Argument(help="TOML file; default: the bundled pair's (29 minutes in all).", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Kinds = Annotated[
    list[str] | None, typer.Option("--kind", help="head, activated, adapted or published; all in the file by default.")
]


@contextmanager
def _one_line_errors(kept: str) -> Iterator[None]:
    """Whatever the package refuses becomes one line on stderr and exit code 2, as in ``cli.main``; so does a file
    system that refuses. Ctrl-C is a line, too, which says what is kept, and exit code 130."""
    try:
        yield
    except (S2TError, OSError) as error:
        typer.echo(f"s2t: {error}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        typer.echo(f"s2t: interrupted. {kept}", err=True)
        raise typer.Exit(130) from None


def _show(json: bool, model: BaseModel, table: Callable[[], Table]) -> None:
    if json:
        typer.echo(model.model_dump_json(indent=2))
    else:
        _console().print(table())


def _show_each(json: bool, results: Iterable[tuple[BaseModel, Table]]) -> None:
    """Each table as soon as it is there; as JSON one document: an object, or a list of several."""
    if not json:
        for _, table in results:
            _console().print(table)
        return
    found = [model.model_dump(mode="json") for model, _ in results]
    if found:
        typer.echo(dumps(found if len(found) > 1 else found[0], indent=2, ensure_ascii=False))


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 200)


def _pairs(title: str, rows: dict[str, object]) -> Table:
    shown = Table("", "", title=title, show_header=False)
    for name, value in rows.items():
        shown.add_row(name, escape(_cell(value)))
    return shown


def _cell(value: object) -> str:
    if isinstance(value, tuple):
        return " to ".join(map(_cell, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@app.command()
def collect(
    config: Config = BUNDLED,
    part: Annotated[
        Literal["train", "heldout", "both", "again"], typer.Option(help="again is the on-policy round.")
    ] = "both",
    usd: Annotated[
        str | None, typer.Option(help="The most that this run may cost on servers, in USD, for each part.")
    ] = None,
    json: Json = False,
) -> None:
    """Make labelled rollouts; run again to go on after an interruption."""
    from ..budget.money import dollars
    from .choices import check_parts
    from .config import read_config

    with _one_line_errors("Whole shards are kept; the same command goes on behind them."):
        pipeline = read_config(config)
        parts: tuple[Part, ...] = ("train", "heldout") if part == "both" else (part,)
        limit = None if usd is None else dollars(usd, "--usd")
        check_parts(pipeline)
        _show_each(json, (_collected(pipeline, name, limit) for name in parts))


def _collected(pipeline: Pipeline, part: Part, usd: Decimal | None) -> tuple[BaseModel, Table]:
    from .collect import collect as run
    from .crew import Crew
    from .pipeline import first_selector
    from .served_costs import spent_in
    from .shards import CollectedFolder, read_manifest, read_shards
    from .verdicts import graded, of_rollouts

    settings = pipeline.collecting(part)
    if part == "again":
        first_selector(pipeline)
    with Crew(pipeline.processes) as crew:
        folder = run(settings, crew, usd=usd).parent
    spent = spent_in(folder)
    shards = read_shards(folder)
    right = f"{sum(int(s.right.sum()) for s in shards) / max(1, sum(map(len, shards))):.1%}"
    rows: dict[str, object] = {
        "folder": folder,
        "trajectories": sum(map(len, shards)),
        "steps": sum(len(shard.ids) for shard in shards),
        "right": right if graded(settings) else "not graded",
    }
    verdict = of_rollouts(settings, shards)
    made = CollectedFolder(**read_manifest(folder).model_dump(), verdict=verdict)
    if verdict is not None:
        rows["verdict"] = verdict
    if spent is not None:
        dollars = spent.spent["usd"]
        made = made.model_copy(update={"served_usd": dollars, "served_tokens": spent.spent["llm_tokens"]})
        rows["tokens on servers"] = f"{made.served_tokens:,}"
        rows["USD on servers"] = "unknown: the models have no price" if dollars is None else f"{dollars:f}"
    return made, _pairs(f"rollouts: {part}", rows)


@app.command()
def train(
    config: Config = BUNDLED,
    kind: Kinds = None,
    paid: Annotated[
        list[Path] | None,
        typer.Option(help="Paid selections (Escalation's record) to learn from, beside the rollouts."),
    ] = None,
    json: Json = False,
) -> None:
    """Train selectors on the collected rollouts; run again to go on after an interruption."""
    from .choices import check_parts
    from .config import read_config

    with _one_line_errors("The last checkpoint is kept; the same command goes on from it."):
        pipeline = read_config(config)
        pipeline = pipeline.model_copy(update={"paid": (*pipeline.paid, *(paid or ()))})
        kinds = pipeline.kinds(kind)
        check_parts(pipeline)
        _show_each(json, _trained(pipeline, kinds))


def _trained(pipeline: Pipeline, kinds: Sequence[Kind]) -> Iterator[tuple[BaseModel, Table]]:
    from ..selectors import SelectorConfig
    from .crew import Crew
    from .train import train as run
    from .verdicts import of_training
    from .workers import Workers

    workers = Workers()
    for kind in kinds:
        with Crew(pipeline.processes if workers.count == 1 else 1) as crew, crew.shown():
            folder = run(pipeline.training(kind), crew)
        if workers.first:
            made = SelectorConfig.load(folder)
            if verdict := of_training(made.training):
                made = made.model_copy(update={"training": {**made.training, "verdict": verdict}})
            figures = {name: value for name, value in made.training.items() if name != "settings"}
            of = " (held-back steps of high entropy or KL)"
            rows = {name + (of if name.startswith("agreement") else ""): value for name, value in figures.items()}
            rows = {"folder": folder, **rows}
            yield made, _pairs(f"selector: {kind}", rows)


@app.command()
def calibrate(config: Config = BUNDLED, kind: Kinds = None, json: Json = False) -> None:
    """Set temperature and thresholds on held-out rollouts."""
    from .choices import check_parts
    from .config import read_config

    with _one_line_errors("Selectors that are calibrated stay so; the same command calibrates the others."):
        pipeline = read_config(config)
        kinds = pipeline.kinds(kind)
        check_parts(pipeline)
        _show_each(json, _calibrated(pipeline, kinds))


def _calibrated(pipeline: Pipeline, kinds: Sequence[Kind]) -> Iterator[tuple[BaseModel, Table]]:
    from .calibrate import Calibrated
    from .pipeline import calibrate_kind
    from .verdicts import of_calibration

    slm = pipeline.models.load_slm()
    for kind in kinds:
        figures = calibrate_kind(pipeline, kind, slm)
        found = Calibrated(**figures.model_dump(), verdict=of_calibration(figures))
        rows = found.model_dump(exclude={"reliability", "entropy_at"}, exclude_none=True)
        rows = {f"{name} (triggered steps)" if name.startswith("agreement") else name: rows[name] for name in rows}
        yield found, _pairs(f"calibration: {kind}", rows)


@app.command("eval")
def evaluate(
    config: Config = BUNDLED,
    task: Annotated[
        str | None,
        typer.Option(
            help="A name of the config's \\[tasks.named]; demo, longer, larger, unseen, hard; talk, call, tool, word; "
            "or a JSONL file. The config's test task by default."
        ),
    ] = None,
    grading: Annotated[
        Literal["exact", "numeric", "math"] | None,
        typer.Option(help="Of a JSONL file; as the config's test file by default."),
    ] = None,
    n: Annotated[
        int | None, typer.Option(min=1, help="Problems; the config's number by default, 500 of a named task.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of problems and sampling; the config's by default, 0 with --task.")
    ] = None,
    selector: Annotated[
        list[Path] | None,
        typer.Option(help="Selector directories, one of a kind, or s2t-demo; those that the config trains by default."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the report and plots.")] = None,
    sweep: Annotated[bool, typer.Option(help="Sweep over K and the trigger rate, too.")] = False,
    json: Json = False,
) -> None:
    """Compare all strategies on the same problems: accuracy, cost, time."""
    from .choices import evaluation, lacking
    from .config import read_config
    from .crew import Crew
    from .evaluate import evaluate as run
    from .report import table

    if out is None:
        kept = "Without --out nothing is kept; the same command begins anew."
    else:
        kept = f"Rows that are done are kept in {out}; the same command goes on behind them."
    with _one_line_errors(kept):
        pipeline = read_config(config)
        settings = evaluation(
            pipeline, task, n, seed, selector or [], out, sweep=sweep, grading=grading, bundled=config == BUNDLED
        )
        for kind, folder in () if selector else lacking(pipeline, settings.selectors).items():
            typer.echo(f"s2t: no {kind} selector at {folder}: left out. Train it, or name one: --selector.", err=True)
        with Crew(pipeline.processes) as crew:
            report = run(settings, crew)
        _show(json, report, lambda: table(report))
        for what, rows in report.sweeps.items():
            if not json:
                Console(width=200).print(f"sweep over {what}", table(report, rows))


@app.command()
def probe(config: Config = BUNDLED, json: Json = False) -> None:
    """Local sufficiency: does the SLM know the LLM's token where they differ, and can it tell?"""
    from .config import read_config
    from .probe import probe as run
    from .probe import table

    with _one_line_errors("Nothing is kept; the same command begins anew."):
        report = run(read_config(config).probing())
        _show(json, report, lambda: table(report))


@app.command()
def pipeline(config: Config = BUNDLED, json: Json = False) -> None:
    """Collect, train, calibrate and evaluate, all from one file."""
    from .config import read_config
    from .pipeline import pipeline as run
    from .probe import table as sufficiency_table
    from .report import table

    with _one_line_errors("All that is finished is kept; the same command goes on."):
        sufficiency, report = run(read_config(config), lambda what: typer.echo(f"* {what}", err=True))
        if not json:
            Console(width=200).print(sufficiency_table(sufficiency))
        _show(json, report, lambda: table(report))
