"""Pictures of the reports. matplotlib is in the ``train`` extra; without it the numbers stand alone."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ..atomic_write import write_whole
from ..selectors.config import Calibration
from .report import EvalReport, RowReport

_log = logging.getLogger(__name__)


@cache
def _pyplot() -> Any:
    """matplotlib without a display, or None where it is not installed, which is said once."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        _log.warning("no plots: matplotlib is not installed (extra train)")
        return None
    return pyplot


def draw(report: EvalReport, folder: Path) -> list[Path]:
    """Accuracy against LLM calls, and against whatever was swept; returns the files written."""
    pyplot = _pyplot()
    if pyplot is None:
        return []
    files = [_pareto(pyplot, report, folder / "pareto.png")]
    for what, rows in report.sweeps.items():
        files.append(_sweep(pyplot, what, rows, folder / f"sweep-{what}.png"))
    return files


def _pareto(pyplot: Any, report: EvalReport, file: Path) -> Path:
    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    colors = {row.name: _point(axis, row.llm_calls, row) for row in report.rows.values()}
    axis.set(xlabel="LLM forwards per answer", ylabel="accuracy", title=f"{report.task}, {report.n} problems")
    axis.set_xscale("symlog", linthresh=1)
    figure.draw_without_rendering()  # from here on, extents are those of the picture
    taken: list[Any] = []
    for row in sorted(report.rows.values(), key=lambda each: -each.accuracy):
        taken.append(_name_beside(axis, row, colors[row.name], taken))
    return _saved(pyplot, figure, axis, file)


def _sweep(pyplot: Any, what: str, rows: dict[str, RowReport], file: Path) -> Path:
    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    lines: dict[str, list[tuple[float, RowReport]]] = {}
    for name, row in rows.items():
        series, _, value = name.rpartition(", ")
        lines.setdefault(series, []).append((float(value.rpartition("=")[2]), row))
    for series, points in lines.items():
        xs, ys = [x for x, _ in points], [row.accuracy for _, row in points]
        (line,) = axis.plot(xs, ys, marker="o", label=series)
        low, high = [row.ci95[0] for _, row in points], [row.ci95[1] for _, row in points]
        axis.fill_between(xs, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axis.set(xlabel={"k": "candidates K", "rate": "trigger rate"}.get(what, what), ylabel="accuracy")
    axis.legend(frameon=False)
    return _saved(pyplot, figure, axis, file)


def draw_reliability(calibration: Calibration, file: Path) -> Path | None:
    """The selector's confidence against how often it agrees with the LLM; None without matplotlib."""
    pyplot = _pyplot()
    if pyplot is None:
        return None
    figure, axis = pyplot.subplots(figsize=(4.5, 4.5), layout="constrained")
    axis.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle=":")
    confidence, agreement, counts = zip(*calibration.reliability, strict=True)
    largest = max(counts)
    axis.scatter(confidence, agreement, s=[20 + 200 * count / largest for count in counts])
    axis.set(xlabel="confidence", ylabel="agreement with the LLM", xlim=(0, 1), ylim=(0, 1))
    return _saved(pyplot, figure, axis, file)


def draw_hits(hits: dict[str, Sequence[float]], file: Path) -> Path | None:
    """Hit@1..K by line, as ``probe`` reports them; None without matplotlib."""
    pyplot = _pyplot()
    if pyplot is None:
        return None
    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, values in hits.items():
        axis.plot(range(1, len(values) + 1), values, marker="o", label=name)
    axis.set(xlabel="K", ylabel="the LLM's token is among the SLM's best K", ylim=(0, 1.02))
    axis.legend(frameon=False, fontsize=8)
    return _saved(pyplot, figure, axis, file)


def _point(axis: Any, x: float, row: RowReport) -> Any:
    """Draw a row's accuracy with its interval; gives the color."""
    low, high = row.ci95
    error = [[row.accuracy - low], [high - row.accuracy]]
    drawn = axis.errorbar(x, row.accuracy, yerr=error, fmt="o", markersize=4, capsize=2)
    return drawn.lines[0].get_color()


def _name_beside(axis: Any, row: RowReport, color: Any, taken: list[Any]) -> Any:
    """Write a row's name at its point, or as far below as it overlaps no name there; gives its extent."""
    place = (row.llm_calls, row.accuracy)
    for below in range(len(taken) + 1):
        offset = (6, 4 - 9 * below)
        name = axis.annotate(row.name, place, textcoords="offset points", xytext=offset, fontsize=8, color=color)
        extent = name.get_window_extent()
        if not any(extent.overlaps(each) for each in taken):
            break
        name.remove()
    return extent


def _saved(pyplot: Any, figure: Any, axis: Any, file: Path) -> Path:
    axis.spines[["top", "right"]].set_visible(False)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120, format="png")
    pyplot.close(figure)
    write_whole(file, drawn.getvalue())
    return file
