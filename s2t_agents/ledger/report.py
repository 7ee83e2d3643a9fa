"""A ledger's totals as a table, JSON or CSV: ``s2t report``."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..budget import money
from ..errors import LedgerError
from .grouped_totals import By, GroupedTotals
from .latency import SHARES, Quantiles
from .ledger import Ledger
from .totals import PARTS, CostSum, Totals

Format = Literal["table", "json", "csv"]

TOTAL = "total"
NAME_WIDTH = 60
"""Columns of a table for a name, at most; a longer one takes several lines."""
ROWS = 1000
"""Groups that a table shows one by one: to lay out more takes longer than to add them up."""
_COUNTS = ("generations", "prompt_tokens", "completion_tokens", "triggers", "selections", "flips", "escalations")
_ALSO = ("refused", "failed", "interrupted", "degraded", "cached", "errors")
_FORMULA = ("=", "+", "-", "@")


def report(ledger: Ledger | str | Path, by: By = "agent", format: Format = "table", *, width: int | None = None) -> str:
    """The totals of a ledger, its last row their sum, from one pass over the records.

    Args:
        ledger: an open one, or the path of a ledger file (``.jsonl``, ``.db``), which must exist.
        by: ``"agent"``, ``"thread"``, ``"run"`` or ``"day"`` (UTC). Answers without a thread or run are in the group
            ``(none)``; one that is itself named so is told in quotes.
        format: ``"table"``, ``"json"`` (one object) or ``"csv"`` (one line a group). Unknown costs are
            ``?`` in the table (with what is known), null in JSON and empty in CSV, never 0.
        width: columns of the table, into which its parts go one below the other where it has more; no figure is ever
            cut. By default those of the terminal, and no limit where standard output is none.

    Raises:
        LedgerError: no such file, not a ledger, a line that is no record, or no such grouping or format.
    """
    return "".join(report_parts(ledger, by, format, width=width))


def report_parts(
    ledger: Ledger | str | Path, by: By = "agent", format: Format = "table", *, width: int | None = None
) -> Iterator[str]:
    """As :func:`report`, piece by piece; the records are read before the first."""
    if format not in get_args(Format):
        raise LedgerError(f"format={format!r}.", hint="Use table, json or csv.")
    opened = ledger if isinstance(ledger, Ledger) else Ledger.reading(ledger)
    grouped = opened.grouped(by)
    if format == "json":
        yield from _json(by, grouped)
    else:
        yield from _csv(by, grouped) if format == "csv" else _table(by, grouped, width)


def _json(by: str, grouped: GroupedTotals) -> Iterator[str]:
    yield f'{{"by": {json.dumps(by)}, "groups": {{'
    for number, (key, sums, latency) in enumerate(grouped):
        split = {part: quantiles.model_dump() for part, quantiles in latency.items()}
        group = {**sums.model_dump(mode="json"), "latency_ms": split}
        yield f"{', ' if number else ''}{json.dumps(key)}: {json.dumps(group)}"
    yield f'}}, "{TOTAL}": {json.dumps(grouped.total().model_dump(mode="json"))}}}'


def _csv(by: str, grouped: GroupedTotals) -> Iterator[str]:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")

    def row(cells: Iterable[Any]) -> str:
        out.seek(0)
        out.truncate()
        writer.writerow(cells)
        return out.getvalue()

    quantiles = [f"{part}_p{share}_ms" for part in PARTS for share in SHARES]
    costs = [f"{part}_usd" for part in ("local", "llm", "total")]
    yield row([by, *_COUNTS, *_ALSO, *costs, "unknown_costs", *quantiles])
    for key, sums, found in grouped:
        split = (found[part].model_dump() if part in found else {} for part in PARTS)
        cells = [round(part[f"p{share}"], 3) if part else "" for part in split for share in SHARES]  # microseconds
        cost = sums.cost_usd
        usd = ["" if each.usd is None else f"{each.usd:f}" for each in (cost.local, cost.llm, cost.total)]
        counts = [getattr(sums, name) for name in (*_COUNTS, *_ALSO)]
        yield row([_safe(key), *counts, *usd, cost.total.unknown, *cells])


def _table(by: str, grouped: GroupedTotals, width: int | None) -> Iterator[str]:
    whole = grouped.total()
    columns = {head: cell for head, cell in _COLUMNS.items() if head != _ERRORS or whole.errors}
    rows = []
    for key, sums, latency in islice(grouped, ROWS):
        rows.append([_printable(key), *(cell(sums) for cell in columns.values()), _three(latency.get("total"))])
    if len(grouped) > ROWS:
        others = grouped.total(skip=ROWS)
        name = f"({len(grouped) - ROWS:,} others: see --csv)"
        rows.append([name, *(cell(others) for cell in columns.values()), ""])
    rows.append([TOTAL, *(cell(whole) for cell in columns.values()), ""])
    names, *figures = ([head, *cells] for head, *cells in zip((by, *columns, "ms\np50/p95/p99"), *rows, strict=True))
    out = io.StringIO()
    console = Console(file=out, width=_UNLIMITED)
    parts = list(_parts(names, figures, width or shutil.get_terminal_size((_UNLIMITED, 0)).columns))
    for number, part in enumerate(parts, 1):
        table = Table(title=f"Costs by {by}" + (f", {number} of {len(parts)}" if len(parts) > 1 else ""))
        table.add_column(by, max_width=NAME_WIDTH, overflow="fold")
        for head, *_ in part:
            table.add_column(head, justify="right", no_wrap=True)
        for at in range(1, len(names)):
            table.add_row(
                Text(names[at]),
                *(column[at] for column in part),
                style="bold" if at == len(names) - 1 else None,
                end_section=at == len(names) - 2,
            )
        console.print(table)
    yield out.getvalue() + _legend(whole)


_UNLIMITED = 100_000
_EDGES = 3
"""Columns around the text of each cell."""


def _parts(names: list[str], figures: list[list[str]], width: int) -> Iterator[list[list[str]]]:
    """Columns that go beside each other and their rows' names, into so much width; one at least."""
    room = left = width - 1 - _EDGES - min(NAME_WIDTH, _width(names))
    part: list[list[str]] = []
    for column in figures:
        takes = _EDGES + _width(column)
        if part and takes > left:
            yield part
            part, left = [], room
        part.append(column)
        left -= takes
    yield part


def _width(column: list[str]) -> int:
    return max(cell_len(line) for cell in column for line in cell.split("\n"))


def _money(cost: CostSum) -> str:
    known = f"{money.rounded(cost.known, -6):f}" if cost.known else "0"
    return f"{known} + {cost.unknown}?" if cost.unknown else known


_ERRORS = "errors"
_COLUMNS: dict[str, Callable[[Totals], str]] = {
    "answers": lambda sums: f"{sums.generations:,}",
    "tokens\nin/out": lambda sums: f"{sums.prompt_tokens:,}/{sums.completion_tokens:,}",
    "selected/\nflipped": lambda sums: f"{sums.selections:,}/{sums.flips:,}",
    "asked/refused/\nfailed": lambda sums: f"{sums.escalations:,}/{sums.refused:,}/{sums.failed:,}",
    _ERRORS: lambda sums: f"{sums.errors:,}",
    "local $": lambda sums: _money(sums.cost_usd.local),
    "LLM $": lambda sums: _money(sums.cost_usd.llm),
    "total $": lambda sums: _money(sums.cost_usd.total),
}


def _legend(whole: Totals) -> str:
    settings = {"device_price": whole.cost_usd.local, "the LLM's price": whole.cost_usd.llm}
    missing = [setting for setting, cost in settings.items() if cost.unknown]
    return f"n?: the cost of n answers is unknown. Set {' and '.join(missing)}.\n" if missing else ""


def _three(quantiles: Quantiles | None) -> str:
    return f"{quantiles.p50:.0f}/{quantiles.p95:.0f}/{quantiles.p99:.0f}" if quantiles else ""


def _printable(key: str) -> str:
    """Names come from outside: no control characters in a terminal or between a table's rows."""
    return "".join(char if char.isprintable() else "�" for char in key)


def _safe(key: str) -> str:
    """A spreadsheet must not run a name as a formula."""
    text = _printable(key)
    return f"'{text}" if text.startswith(_FORMULA) else text
