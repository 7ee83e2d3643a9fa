"""Bars of long work: they say how fast it goes and how long it will take, also where a piece takes minutes."""

import io

from rich.console import Console

from s2t_agents.training.progress import Bar, progress_on


def test_rate_and_time_left_are_shown_when_a_piece_takes_minutes():
    now = [0.0]
    shown = io.StringIO()
    progress = progress_on(Console(file=shown, force_terminal=True, width=120), lambda: now[0])
    bar = Bar(progress, "collect", 1280)
    for _ in range(2):
        now[0] += 256.0
        bar.advance(128)
    with progress.console.capture() as captured:
        progress.console.print(progress.get_renderable())
    line = captured.get()
    assert "256/1280" in line
    assert "0.5/s" in line
    assert "0:34:08" in line  # 1024 items at half a second each


def test_a_bar_is_silent_where_nobody_looks():
    shown = io.StringIO()
    with progress_on(Console(file=shown, force_terminal=False)) as progress:
        Bar(progress, "collect", 2).advance()
    assert shown.getvalue() == ""
