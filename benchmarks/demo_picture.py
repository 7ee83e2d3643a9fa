"""Draw what ``s2t demo`` prints, for the README: ``python -m benchmarks.demo_picture``."""

from __future__ import annotations

import io
import re
from pathlib import Path

import torch
from rich.console import Console
from rich.terminal_theme import MONOKAI

from s2t_agents.demo.agent import run_demo
from s2t_agents.demo.show import show
from s2t_agents.demo.world import demo_question

PICTURE = Path(__file__).parent / "results" / "demo.svg"
SEED = 35


def draw() -> str:
    """The demo's output as SVG, in whatever monospaced font the reader has: nothing is fetched to look at it."""
    torch.set_num_threads(1)
    console = Console(record=True, width=100, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    show(run_demo(demo_question(SEED)), console)
    svg = console.export_svg(title="s2t demo", theme=MONOKAI, unique_id="demo")
    return re.sub(r"@font-face \{.*?\}\s*|<!-- .*? -->\s*", "", svg, flags=re.DOTALL)


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
