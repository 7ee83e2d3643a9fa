"""Progress bars with rate and time left, on stderr, so that ``--json`` output stays clean.

One terminal has one display. A crew's processes (see ``crew``) draw nothing: they tell how far they are, and the
process that they work for draws it. Where stderr is no terminal, long work writes a line a minute.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from ..scheduling.waits import Waiting

T = TypeVar("T")

WINDOW_S = 3600.0
"""Seconds that a rate looks back: a shard or a batch of problems may take minutes."""

LINE_S = 60.0
"""Seconds between lines where no bar can be drawn."""

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


_quiet = False


@contextmanager
def quiet(really: bool) -> Iterator[None]:
    """No bars of this process in the block, if ``really``: another one shows the same work."""
    global _quiet
    before, _quiet = _quiet, really
    try:
        yield
    finally:
        _quiet = before


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
    """Shows nothing."""

    def advance(self, by: float = 1) -> None:
        """See ``Bar``."""

    def say(self, what: str) -> None:
        """See ``Bar``."""


HIDDEN = HiddenBar()


def counted(computation: Waiting[T], bar: Bar) -> Waiting[T]:
    """The same computation; the bar is one further when it ends."""
    result = yield from computation
    bar.advance()
    return result


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


class LineBar:
    """A bar as lines of text, for a log.

    Args:
        what: the work.
        total: of it.
        write: takes a line.
        clock: seconds.
    """

    def __init__(
        self, what: str, total: float, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write, self._clock = write, clock
        self._what, self._done, self._total = what, 0.0, total
        self._began, self._began_with = clock(), 0.0

    def advance(self, by: float = 1) -> None:
        """See ``Bar``."""
        if self._clock() - self._began < 1:
            self._began_with += by  # done by an earlier run
        self._done += by

    def say(self, what: str) -> None:
        """See ``Bar``."""
        self._what = what

    def line(self) -> None:
        """Write how far it is: what was done, how long it took, and what the rest will take."""
        took, made = self._clock() - self._began, self._done - self._began_with
        left = f"{_clock_time((self._total - self._done) * took / made)} left" if made else "time left unknown"
        self._write(f"{self._what}  {self._done:,g}/{self._total:,g}  {_clock_time(took)} so far, {left}")


def _clock_time(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


@contextmanager
def lines_of(bar: LineBar, every: float = LINE_S) -> Iterator[LineBar]:
    """The bar's lines are written in this block, also while a piece of the work takes long."""
    over = threading.Event()

    def write() -> None:
        while not over.wait(every):
            bar.line()

    writing = threading.Thread(target=write, daemon=True)
    writing.start()
    try:
        yield bar
    finally:
        over.set()
        writing.join()


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def bar(what: str, total: float) -> Iterator[Bar]:
    """A bar for a block of work; a line a minute where stderr is no terminal."""
    if _quiet:
        yield HIDDEN
        return
    if _post is not None:
        told = ToldBar(_post, what, total)
        try:
            yield told
        finally:
            told.close()
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        with lines_of(LineBar(what, total, _to_stderr)) as lines:
            yield lines
        return
    with progress_on(console) as progress:
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
