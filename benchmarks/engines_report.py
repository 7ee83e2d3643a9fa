"""What ``engines`` found, as tables: for people, and as Markdown for the documentation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Group
from rich.table import Table


def table(result: dict[str, Any]) -> Group:
    """The result for people."""
    shown = []
    for length, heads, lines in tables_of(result):
        title = f"{result['model']}, prompts of {length} tokens" if length else None
        rows = Table(*heads, title=title, title_justify="left")
        for line in lines:
            rows.add_row(*line)
        shown.append(rows)
    return Group(*shown)


def tables_of(result: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Heads and cells: of every length of prompts, and, without a length, of turn ten and memory."""
    for length, part in result["rows"].items():
        firsts, at_once = result["first_token_ms"][length], part["at_once"]
        names = dict.fromkeys(name for rows in at_once.values() for name in rows)
        lines = [
            [
                name,
                *(_cell(rows.get(name)) for rows in at_once.values()),
                f"{firsts[name]:.0f}" if name in firsts else "",
            ]
            for name in names
        ]
        yield length, ["tokens/s; CPU ms a token", *(f"{n} at once" for n in at_once), "first token, ms"], lines
    if "memory_mb" in result:
        turn = result["turn_ten"]
        lines = [
            [
                name,
                *((f"{turn[name][what]:.0f}" if name in turn else "") for what in ("kept", "new_alone")),
                f"{mb:.0f}",
            ]
            for name, mb in result["memory_mb"].items()
        ]
        yield "", ["", "first token of turn 10, ms", "its new tokens alone", "peak memory, MB"], lines


def of_cpu_time(result: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """The same of a run on a machine that had other work: what took CPU time, without what took a while."""
    for length, part in result["rows"].items():
        at_once = part["at_once"]
        names = dict.fromkeys(name for rows in at_once.values() for name in rows)
        lines = [
            [name, *(_cpu_cell(rows.get(name)) for rows in at_once.values())]  # a head runs alone only
            for name in names
        ]
        yield length, ["CPU ms a token", *(f"{n} at once" for n in at_once)], lines
    if "memory_mb" in result:
        yield "", ["", "peak memory, MB"], [[name, f"{mb:.0f}"] for name, mb in result["memory_mb"].items()]


def _cpu_cell(row: dict[str, float] | None) -> str:
    return "" if row is None else f"{row['cpu_ms']:.1f} ({row['over_bare_cpu']:.2f})"


def _cell(row: dict[str, float] | None) -> str:
    if row is None:
        return ""
    return f"{row['tokens_per_s']:.0f} ({row['over_bare']:.2f}); {_cpu_cell(row)}"


def markdown(report: dict[str, Any], made: dict[str, Any]) -> str:
    """The tables for the documentation, with where and when they were made.

    ``made["load"]``, if it is there, is that of other work on the machine.
    """
    lines: list[str] = []
    for length, heads, rows in of_cpu_time(report) if "load" in made else tables_of(report):
        heads[0] = f"prompts of {int(length):,} tokens: {heads[0]}" if length else ""
        lines += [
            f"| {' | '.join(heads)} |",
            "|---" * len(heads) + "|",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
        ]
    every = [row for part in report["rows"].values() for rows in part["at_once"].values() for row in rows.values()]
    if "load" in made:
        figures = (
            f"CPU time of the process: the machine had other work (load {made['load']}), so that its wall-clock says "
            f"nothing. In brackets: tokens per CPU time"
        )
    else:
        figures = (
            "Tokens/s of all sequences together after their prompts are read, and ms of the process's CPU time a "
            "token; in brackets both"
        )
    what = (
        f"{figures} beside bare llama.cpp in the same turn, 1 is equal and more is faster. Turns: at least "
        f"{min(row['turns'] for row in every)}. {report['model']} ({report['quantization']}), and the checkpoint that "
        f"it dequantises to; threads: {report['threads']}. {made['hardware']}, commit {made['commit']}, "
        f"{made['date']}. Made by `{made['command']}`."
    )
    return "\n".join([*lines, what])
