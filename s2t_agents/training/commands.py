"""``s2t collect | train | calibrate | eval | probe | pipeline``: one TOML file in, tables or JSON out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import ConfigError, S2TError

app = typer.Typer(no_args_is_help=True, help="Train and measure selectors.")

BUNDLED = Path(__file__).parent.parent / "demo" / "selector.toml"

Config = Annotated[Path, typer.Argument(help="TOML file; the bundled demo's when left out.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Kinds = Annotated[
    list[str] | None, typer.Option("--kind", help="head, activated or published; all in the file by default.")
]


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Whatever the package refuses becomes one line on stderr and exit code 2, as in ``cli.main``; so does a file
    system that refuses."""
    try:
        yield
    except (S2TError, OSError) as error:
        typer.echo(f"s2t: {error}", err=True)
        raise typer.Exit(2) from error


def _show(json: bool, model: Any, table: Callable[[], Table]) -> None:
    if json:
        typer.echo(model.model_dump_json(indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else 200).print(table())


def _pairs(title: str, rows: dict[str, object]) -> Table:
    shown = Table("", "", title=title, show_header=False)
    for name, value in rows.items():
        shown.add_row(name, str(value))
    return shown


@app.command()
def collect(
    config: Config = BUNDLED,
    part: Annotated[str, typer.Option(help="train, heldout, both, or again (the on-policy round).")] = "both",
    json: Json = False,
) -> None:
    """Make labelled rollouts; run again to go on after an interruption."""
    from .collect import collect as run
    from .config import read_config
    from .crew import Crew
    from .pipeline import first_selector
    from .shards import read_manifest, read_shards

    with _one_line_errors():
        pipeline = read_config(config)
        if part not in ("train", "heldout", "both", "again"):
            raise ConfigError(f"part is {part!r}; it must be train, heldout, both or again.")
        for name in ("train", "heldout", "again"):
            if part != name and (part != "both" or name == "again"):
                continue
            if name == "again":
                first_selector(pipeline)
            with Crew(pipeline.processes) as crew:
                manifest = run(pipeline.collecting(name), crew)
            shards = read_shards(manifest.parent)
            rows: dict[str, object] = {
                "folder": manifest.parent,
                "trajectories": sum(map(len, shards)),
                "steps": sum(len(shard.ids) for shard in shards),
                "right": f"{sum(int(s.right.sum()) for s in shards) / max(1, sum(map(len, shards))):.1%}",
            }
            _show(json, read_manifest(manifest.parent), lambda rows=rows, name=name: _pairs(f"rollouts: {name}", rows))  # type: ignore[misc]


@app.command()
def train(
    config: Config = BUNDLED,
    kind: Kinds = None,
    paid: Annotated[
        list[Path] | None, typer.Option(help="Paid selections (Escalation's record) to learn from besides.")
    ] = None,
    json: Json = False,
) -> None:
    """Train selectors on the collected rollouts; run again to go on after an interruption."""
    from ..selectors import SelectorConfig
    from .config import read_config
    from .train import train as run
    from .workers import Workers

    with _one_line_errors():
        pipeline = read_config(config)
        pipeline = pipeline.model_copy(update={"paid": (*pipeline.paid, *(paid or ()))})
        for each in kind or list(pipeline.train):
            folder = run(pipeline.training(each))  # type: ignore[arg-type]
            if not Workers().first:
                continue
            made = SelectorConfig.load(folder)
            rows = {"folder": folder, **{k: v for k, v in made.training.items() if k != "settings"}}
            _show(json, made, lambda rows=rows, each=each: _pairs(f"selector: {each}", rows))  # type: ignore[misc]


@app.command()
def calibrate(config: Config = BUNDLED, kind: Kinds = None, json: Json = False) -> None:
    """Set temperature and thresholds on held-out rollouts."""
    from .config import read_config
    from .pipeline import calibrate_kind

    with _one_line_errors():
        pipeline = read_config(config)
        slm = pipeline.models.load_slm()
        for each in kind or list(pipeline.train):
            found = calibrate_kind(pipeline, each, slm)  # type: ignore[arg-type]
            rows = found.model_dump(exclude={"reliability", "entropy_at"})
            _show(json, found, lambda rows=rows, each=each: _pairs(f"calibration: {each}", rows))  # type: ignore[misc]


@app.command("eval")
def evaluate(
    config: Config = BUNDLED,
    task: Annotated[
        str | None,
        typer.Option(help="demo, longer, larger, unseen, hard, or a JSONL file; the config's test task by default."),
    ] = None,
    grading: Annotated[
        str | None, typer.Option(help="Of a JSONL file: exact, numeric or math; as the config's test task by default.")
    ] = None,
    n: Annotated[int, typer.Option(min=1, help="Problems.")] = 500,
    seed: Annotated[int, typer.Option(min=0, help="Of problems, lots and votes.")] = 0,
    selector: Annotated[list[Path] | None, typer.Option(help="Selector directories; the config's by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the report and plots.")] = None,
    sweep: Annotated[bool, typer.Option(help="Sweep over K and the trigger rate, too.")] = False,
    json: Json = False,
) -> None:
    """Answer the same problems in every way: accuracy, cost, time."""
    from .choices import evaluation
    from .config import read_config
    from .crew import Crew
    from .evaluate import evaluate as run
    from .grading import GRADERS
    from .report import table

    with _one_line_errors():
        if grading not in (None, *GRADERS):
            raise ConfigError(f"grading is {grading!r}; it must be exact, numeric or math.")
        pipeline = read_config(config)
        settings = evaluation(pipeline, task, n, seed, selector or [], out, sweep=sweep, grading=grading)  # type: ignore[arg-type]
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

    with _one_line_errors():
        report = run(read_config(config).probing())
        _show(json, report, lambda: table(report))


@app.command()
def pipeline(config: Config = BUNDLED, json: Json = False) -> None:
    """Collect, train, calibrate and evaluate, all from one file."""
    from .config import read_config
    from .pipeline import pipeline as run
    from .probe import table as sufficiency_table
    from .report import table

    with _one_line_errors():
        sufficiency, report = run(read_config(config), lambda what: typer.echo(f"* {what}", err=True))
        if not json:
            Console(width=200).print(sufficiency_table(sufficiency))
        _show(json, report, lambda: table(report))
