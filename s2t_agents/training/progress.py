"""Progress bars with rate and time left, on stderr, so that ``--json`` output stays clean.

One terminal has one display. A crew's processes (see ``crew``) draw nothing: they tell how far they are, and the
process that they work for draws it.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

WINDOW_S = 3600.0
"""Seconds that a rate looks back: a shard or a batch of problems may take minutes."""

TELL_S = 0.5
"""Seconds between what a crew's process tells of itself."""


class Told(NamedTuple):
    """How far one process of a crew is; ``total`` None: the work behind this bar is over."""

    process: int
    what: str
    done: float
    total: float | None


class Post(Protocol):
    """Where a crew's processes put what they tell: a queue between processes."""

    def put(self, told: Told | None) -> None:
        """Send."""
        ...

    def get(self) -> Told | None:
        """Wait for the next."""
        ...


_post: Post | None = None


def tell(post: Post | None) -> None:
    """From here on this process, one of a crew, tells how far it is instead of drawing it."""
    global _post
    _post = post


class Rate(TextColumn):
    """Units per second."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        """The column's text."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f}/s", style="progress.data.speed")


class Bar(Protocol):
    """How far a block of work is."""

    def advance(self, by: float = 1) -> None:
        """So much more is done."""
        ...

    def say(self, what: str) -> None:
        """Another text before the bar."""
        ...


class HiddenBar:
    """Nobody looks."""

    def advance(self, by: float = 1) -> None:
        """See ``Bar``."""

    def say(self, what: str) -> None:
        """See ``Bar``."""


HIDDEN = HiddenBar()


class DrawnBar:
    """A bar on this process's display."""

    def __init__(self, progress: Progress, what: str, total: float) -> None:
        self._progress = progress
        self._id = progress.add_task(what, total=total)
        progress.advance(self._id, 0)  # the rate counts from here, not from the first piece of work that is done

    def advance(self, by: float = 1) -> None:
        """See ``Bar``."""
        self._progress.advance(self._id, by)

    def say(self, what: str) -> None:
        """See ``Bar``."""
        self._progress.update(self._id, description=what)


class ToldBar:
    """A bar that another process draws."""

    def __init__(self, post: Post, what: str, total: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._post, self._clock = post, clock
        self._what, self._done, self._total, self._told_at = what, 0.0, total, clock()
        self._tell(total)

    def advance(self, by: float = 1) -> None:
        """See ``Bar``."""
        self._done += by
        if self._clock() - self._told_at >= TELL_S:
            self._tell(self._total)

    def say(self, what: str) -> None:
        """See ``Bar``."""
        self._what = what
        self._tell(self._total)

    def close(self) -> None:
        """The work is over."""
        self._tell(None)

    def _tell(self, total: float | None) -> None:
        self._told_at = self._clock()
        self._post.put(Told(os.getpid(), self._what, self._done, total))


@contextmanager
def bar(what: str, total: float) -> Iterator[Bar]:
    """A bar for a block of work; silent where stderr is no terminal."""
    if _post is not None:
        told = ToldBar(_post, what, total)
        try:
            yield told
        finally:
            told.close()
        return
    with progress_on(Console(stderr=True)) as progress:
        yield DrawnBar(progress, what, total)


def draw(post: Post, console: Console) -> None:
    """Draw what a crew's processes tell, one line each, until None comes."""
    with progress_on(console) as progress:
        lines: dict[int, TaskID] = {}
        while (told := post.get()) is not None:
            line = lines.get(told.process)
            if line is None:
                line = lines[told.process] = progress.add_task(told.what, total=told.total)
            elif not told.done and told.total is not None:
                progress.reset(line, total=told.total)
            progress.update(line, description=told.what, completed=told.done, visible=told.total is not None)


def progress_on(console: Console, clock: Callable[[], float] = time.monotonic) -> Progress:
    """The columns of every bar; none of them in a crew's process."""
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
