"""Draw what ``s2t demo`` and ``s2t report`` print, for README and docs: ``python -m benchmarks.demo_picture``.

With a folder, ``python -m benchmarks.demo_picture runs/smollm2``, what ``make real-demo`` prints.
"""

from __future__ import annotations

import io
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.terminal_theme import MONOKAI

from s2t_agents.demo.agent import run_demo
from s2t_agents.demo.show import show
from s2t_agents.demo.world import demo_question
from s2t_agents.ledger.report import report

from . import demo_ledger

RESULTS = Path(__file__).parent / "results"
SEED = 35


def draw() -> str:
    """The demo's output as SVG."""
    torch.set_num_threads(1)
    console = _console()
    show(run_demo(demo_question(SEED)), console)
    return _picture(console, "s2t demo")


def draw_real(home: Path) -> str:
    """The output of the agents on the real pair in this folder, as SVG."""
    from examples.real_pair.agent import main

    said, console = io.StringIO(), _console()
    with redirect_stdout(said):
        main(home)
    console.print(said.getvalue().rstrip(), highlight=False, markup=False)
    return _picture(console, "make real-demo")


def draw_report(ledger: Path) -> str:
    """The report of a ledger's file as SVG."""
    console = _console(width=120)
    console.print(f"$ s2t report {ledger.name}", highlight=False)
    console.print(report(ledger, width=120).rstrip(), highlight=False, markup=False)
    return _picture(console, "s2t report")


def _console(width: int = 100) -> Console:
    return Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")


def _picture(console: Console, title: str) -> str:
    """In whatever monospaced font the reader has: nothing is fetched to look at it."""
    svg = console.export_svg(title=title, theme=MONOKAI, unique_id=title.replace(" ", "-").removeprefix("s2t-"))
    return re.sub(r"@font-face \{.*?\}\s*|<!-- .*? -->\s*", "", svg, flags=re.DOTALL)


if __name__ == "__main__":
    if sys.argv[1:]:
        (RESULTS / "real_demo.svg").write_text(draw_real(Path(sys.argv[1])), encoding="utf-8")
    else:
        (RESULTS / "demo.svg").write_text(draw(), encoding="utf-8")
        with TemporaryDirectory() as folder:
            demo_ledger.write(Path(folder) / "costs.db")
            (RESULTS / "report.svg").write_text(draw_report(Path(folder) / "costs.db"), encoding="utf-8")
