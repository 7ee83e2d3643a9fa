"""The command line of the benchmarks: ``s2t bench NAME`` in a checkout, ``python -m benchmarks NAME`` anywhere."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Run benchmarks against a baseline.")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Quick = Annotated[bool, typer.Option("--quick", help="Show that it runs; measures nothing.")]


class TrainShape(StrEnum):
    """``train.SHAPES`` by name, known without loading torch."""

    HALF_BILLION = "0.5b"
    TINY = "tiny"


@app.command()
def budget(
    seconds: Annotated[float, typer.Option(min=0.1, help="Per store and thread count.")] = 1.0, as_json: AsJson = False
) -> None:
    """Reserve + settle pairs per second on every budget store."""
    from .budget import run, table

    _show(run(seconds), as_json, table)


@app.command()
def escalate(
    n: Annotated[int, typer.Option(min=1, help="Held-out problems.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first problem.")] = 0,
    rate: Annotated[float, typer.Option(min=0.001, max=1, help="Share of tokens at which the LLM is asked.")] = 0.05,
    as_json: AsJson = False,
) -> None:
    """LLM forwards, tokens and time per answer, beside an LLM that reads along on every token."""
    from .escalate import run, table

    _show(run(n, seed, rate=rate), as_json, table)


@app.command()
def tokenizers(
    slm: Annotated[Path, typer.Option(help="The SLM, with a chat template.")],
    llm: Annotated[Path, typer.Option(help="An LLM with another tokenizer.")],
    n: Annotated[int, typer.Option(min=1, help="Problems.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first problem.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 64,
    as_json: AsJson = False,
) -> None:
    """An LLM with another tokenizer: tokens read, time beside one with the same tokenizer, agreement with all paths."""
    from .tokenizers import run, table

    say = Console(stderr=True, soft_wrap=True).print
    _show(run(str(slm), str(llm), n, seed, max_tokens=max_tokens, say=say), as_json, table)


@app.command()
def pacing(
    n: Annotated[int, typer.Option(min=1, help="Held-out problems.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first problem.")] = 0,
    as_json: AsJson = False,
) -> None:
    """What pacing a budget gains, beside first come, first served, and hindsight."""
    from .pacing import run, table

    _show(run(n, seed), as_json, table)


@app.command()
def decode(
    model: Annotated[list[str] | None, typer.Option(help="s2t-demo or qwen2.5-0.5b; both by default.")] = None,
    part: Annotated[
        list[str] | None, typer.Option(help="decode, chat, parallel, loops, turns or growth; all by default.")
    ] = None,
    long: Annotated[bool, typer.Option("--long", help="Prompts of 4,096 and 8,192 tokens, and more repeats.")] = False,
    quick: Quick = False,
    as_json: AsJson = False,
) -> None:
    """Time per token beside transformers and the published scheme, concurrent generations, turns.

    Seven minutes on two cores with AVX-512, twice as long without; --long takes three times as long.
    """
    from .speed import MODELS, PARTS, run, table

    say = Console(stderr=True).print
    _show(run(say, models=model or MODELS, parts=part or PARTS, long=long, quick=quick), as_json, table)


@app.command()
def train(
    shape: Annotated[TrainShape, typer.Option(help="Of the model (random weights).")] = TrainShape.HALF_BILLION,
    prefix: Annotated[int, typer.Option(min=8, help="Tokens before the first group.")] = 512,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions of each measurement; the median counts.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Labelled groups per second: one pass over a trajectory beside the published way."""
    from .train import run, table

    _show(run(shape=shape.value, prefix=prefix, repeats=repeats), as_json, table)


@app.command()
def gpu(
    device: Annotated[str, typer.Option(help="cuda, cuda:1, ... or cpu.")] = "cuda",
    shape: Annotated[str, typer.Option(help="Of the model (random weights, bf16).")] = "qwen2.5-1.5b",
    out: Annotated[Path | None, typer.Option(help="A file that has all findings so far at any time.")] = None,
    as_json: AsJson = False,
) -> None:
    """Correctness and speed on a GPU, within eight minutes."""
    from .gpu import lines, run

    def keep(result: dict[str, Any]) -> None:
        if out is not None:
            fresh = out.with_suffix(f"{out.suffix}.new")
            fresh.write_text(json.dumps(result), encoding="utf-8")
            fresh.replace(out)

    result = run(device, shape, say=lambda text: typer.echo(text, err=True), keep=keep)
    for line in [json.dumps(result)] if as_json else lines(result):
        typer.echo(line)
    if not result["correct"]:
        raise typer.Exit(1)


@app.command()
def against(
    commit: Annotated[str, typer.Argument(help="Of this repository, beside the working tree.")],
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each row, at most; the median counts.")] = 10,
    minutes: Annotated[float, typer.Option(min=0, help="No turn begins that would not end within them.")] = 9.0,
    model: Annotated[str | None, typer.Option(help="Only s2t-demo, or only qwen2.5-0.5b.")] = None,
    quick: Quick = False,
    as_json: AsJson = False,
) -> None:
    """Time per token, first token and memory of another commit beside the working tree's, interleaved."""
    from .against import run, table

    say = Console(stderr=True).print
    _show(run(commit, repeats=repeats, minutes=minutes, model=model, quick=quick, say=say), as_json, table)


@app.command()
def engines(
    gguf: Annotated[Path, typer.Option(help="The model's GGUF file.")],
    checkpoint: Annotated[Path, typer.Option(help="The same weights for PyTorch.")],
    prompt: Annotated[list[int] | None, typer.Option(help="Lengths of prompts; 128 and 1,024 by default.")] = None,
    at_once: Annotated[list[int] | None, typer.Option(help="Numbers of sequences; 1, 4 and 8 by default.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="After which no further turn begins.")] = 200.0,
    out: Annotated[
        Path | None, typer.Option(help="A result that this one joins: other lengths of prompts stay.")
    ] = None,
    most: Annotated[
        int, typer.Option(help="Tokens of all prompts together, beyond which fewer answer at once.")
    ] = 8192,
    rows_only: Annotated[bool, typer.Option("--rows-only", help="Neither turn ten nor memory.")] = False,
    quick: Quick = False,
    as_json: AsJson = False,
) -> None:
    """Tokens/s, first tokens and memory of llama.cpp, of both of our backends, and of transformers, on one model."""
    from .engines import joined, run
    from .engines_report import table

    say = Console(stderr=True).print
    result = run(
        gguf,
        checkpoint,
        prompts=prompt or (128, 1024),
        at_once=at_once or (1, 4, 8),
        seconds=seconds,
        most=most,
        rows_only=rows_only,
        quick=quick,
        say=say,
    )
    if out is not None:
        result = joined(result, out)
    _show(result, as_json, table)


@app.command()
def served(
    url: Annotated[str, typer.Argument(help="Of a server of OpenAI's completions API on this machine, as vLLM's.")],
    checkpoint: Annotated[Path, typer.Option(help="What it serves.")],
    dtype: Annotated[str, typer.Option(help="Of the weights, in both.")] = "bfloat16",
    at_once: Annotated[list[int] | None, typer.Option(help="Numbers of sequences; 1, 4 and 8 by default.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each; the median counts.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Tokens/s of several sequences at once beside a server with the same weights. A minute or two."""
    from .served import run, table

    say = Console(stderr=True).print
    found = run(url, str(checkpoint), dtype=dtype, at_once=at_once or (1, 4, 8), repeats=repeats, say=say)
    _show(found, as_json, table)


@app.command()
def ledger(
    megabytes: Annotated[int, typer.Option(min=1, help="Of each ledger.")] = 500, as_json: AsJson = False
) -> None:
    """Seconds and memory of `s2t report` on a large ledger."""
    from .ledger import run, table

    _show(run(megabytes, say=lambda text: typer.echo(text, err=True)), as_json, table)


@app.command()
def schemas(
    folder: Annotated[Path, typer.Argument(help="Of JSON schemas, or of JSON lines with tools, as in BFCL.")],
    as_json: AsJson = False,
) -> None:
    """How many schemas of a folder bind, how long that takes, what is given up."""
    from .schemas import run, table

    logging.disable(logging.WARNING)
    _show(run(folder), as_json, table)


@app.command()
def soak(minutes: Annotated[float, typer.Option(min=0.1, help="Memory is judged from 3 on.")] = 5.0) -> None:
    """Eight agents, cancelled at random, on tight budgets: one line of JSON, and failure if anything is left behind."""
    from .soak import run

    result = run(minutes)
    typer.echo(json.dumps(result))
    if result["leaked"]:
        raise typer.Exit(1)


def _show(result: dict[str, Any], as_json: bool, table: Callable[[dict[str, Any]], RenderableType]) -> None:
    if as_json:
        typer.echo(json.dumps(result))
    else:
        Console().print(table(result))
