"""Progress bars with rate and time left, on stderr, so that ``--json`` output stays clean."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

WINDOW_S = 3600.0
"""Seconds that a rate looks back: a shard or a batch of problems may take minutes."""


class Rate(TextColumn):
    """Units per second."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        """The column's text."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f}/s", style="progress.data.speed")


class Bar:
    """One bar."""

    def __init__(self, progress: Progress, what: str, total: float) -> None:
        self._progress = progress
        self._id = progress.add_task(what, total=total)
        progress.advance(self._id, 0)  # the rate counts from here, not from the first piece of work that is done

    def advance(self, by: float = 1) -> None:
        """So much more is done."""
        self._progress.advance(self._id, by)

    def say(self, what: str) -> None:
        """Another text before the bar."""
        self._progress.update(self._id, description=what)


@contextmanager
def bar(what: str, total: float) -> Iterator[Bar]:
    """A bar for a block of work; silent where stderr is no terminal, and in a crew's processes: they share one."""
    console = Console(stderr=True)
    with progress_on(console) as progress:
        yield Bar(progress, what, total)


def progress_on(console: Console, clock: Callable[[], float] = time.monotonic) -> Progress:
    """The columns of every bar."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal or multiprocessing.parent_process() is not None,
        get_time=clock,
        speed_estimate_period=WINDOW_S,
    )
