"""Independent pieces of work, each done by one of a few processes: where one small model cannot fill all cores.

Shards of rollouts and trainings of several kinds are such pieces. Each process loads its own models and takes an equal
share of this process's threads.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from types import TracebackType
from typing import Any, TypeVar

import torch
from rich.console import Console

from ..errors import S2TError
from .progress import Post, draw, tell

PRELOADED = "s2t_agents.training.pipeline"
"""Imported once, for all processes of a crew: it takes seconds."""

Piece = TypeVar("Piece")
Made = TypeVar("Made")


class Crew:
    """So many processes; started at their first work, gone when the block is left. An error ends them at once.

    Args:
        count: of processes; with one there are none besides this one.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self._pool: ProcessPoolExecutor | None = None
        self._context = process_context()
        # closed when it is over: unlike an Event, a pipe is no matter to a process that was killed
        self._over: Connection | None = None
        self._open: Connection | None = None
        if count > 1:
            self._over, self._open = self._context.Pipe(duplex=False)
        self._post: Post | None = self._context.Queue() if count > 1 and sys.stderr.isatty() else None

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None and self._open is not None:
            self._open.close()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def each(self, work: Callable[[Piece], Made], pieces: Iterable[Piece]) -> Iterator[Made]:
        """What ``work`` makes of every piece, in the order in which they are done.

        Args:
            work: a function of a module, or a ``partial`` of one: it travels to the processes.
            pieces: the first are begun first.

        Raises:
            S2TError: a process died; or as ``work`` does. Pieces not begun yet are left out.
        """
        if self.count == 1:
            yield from map(work, pieces)
            return
        if self._pool is None:
            assert self._over is not None
            own = max(1, torch.get_num_threads() // self.count), self._over, self._post
            self._pool = ProcessPoolExecutor(self.count, self._context, initializer=_begin, initargs=own)
        futures = [self._pool.submit(work, piece) for piece in pieces]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise S2TError(
                f"one of {self.count} processes died (out of memory?); what was finished is kept.",
                hint="Run it again to go on, with a smaller `processes` if memory was short.",
            ) from error
        finally:
            for future in futures:
                future.cancel()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The bars of its processes are drawn in this block; it has no other bars meanwhile."""
        if self._post is None:
            yield
            return
        drawing = threading.Thread(target=draw, args=(self._post, Console(stderr=True)), daemon=True)
        drawing.start()
        try:
            yield
        finally:
            self._post.put(None)
            drawing.join()


def process_context() -> BaseContext:
    """The start method: ``forkserver`` with the libraries preloaded on Linux, where it is safe; else ``spawn``.

    Never ``fork``: OpenMP's threads do not survive it.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    return context


def _begin(threads: int, over: Connection, post: Any) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_leave, args=(over,), daemon=True).start()
    if post is not None:
        post.cancel_join_thread()  # do not wait for messages that are not read
    tell(post)


def _leave(over: Connection) -> None:
    """In the middle of a piece, when the parent has closed its end of the pipe, or was killed, which closes it too.

    Files are written whole or not at all, so nothing is left half done.
    """
    with suppress(EOFError, OSError):
        over.recv()
    os._exit(1)
