"""Files that are there whole or not at all, and folders that one run at a time fills."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .errors import FolderInUse, S2TError

try:
    import fcntl
except ImportError:  # Windows: an open file cannot be taken away there, and runs are not kept apart
    fcntl = None  # type: ignore[assignment]

LOCK = ".run.lock"
_PART = ".part"


def write_whole(path: Path, data: bytes) -> None:
    """Make or replace a file in one move, on disk before it counts; its folder is made where it is missing.

    Each writer has a file of its own until then, so several may write the same one: the last move counts. What writers
    of this file left behind when they were killed goes.

    Raises:
        S2TError: naming the file and what the system said; what stood there before stands.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        with _own(path) as (half, file):
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            half.replace(path)
    except OSError as error:
        raise S2TError(
            f"{path} could not be written: {error.strerror}.", hint="What was written before is kept; run again."
        ) from error


@contextmanager
def sole_run(folder: Path) -> Iterator[None]:
    """One run at a time in this block, in all processes of this machine; the folder is made where it is missing.

    Raises:
        FolderInUse: another run is at work there; nothing was touched.
        S2TError: the folder cannot be made or written.
    """
    if fcntl is None:
        yield
        return
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked(folder / LOCK)
    except OSError as error:
        raise S2TError(
            f"{folder} cannot be written: {error.strerror}.", hint="Give a folder that can be made here."
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink()
        file.close()
        if made:
            with suppress(OSError):  # it holds something
                folder.rmdir()


def _locked(path: Path) -> IO[bytes]:
    """The lock file, ours; whoever held it before may have taken it away just now."""
    while True:
        file = path.open("ab+", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            other = file.read(20).decode(errors="replace").strip() or "unknown"
            file.close()
            raise FolderInUse(
                f"another run, pid {other}, is at work in {path.parent}.",
                hint="Wait until it is done, end it, or give this run a folder of its own.",
            ) from None
        except OSError:  # a file system without locks
            return file
        if _still_there(file, path):
            file.truncate(0)
            file.write(f"{os.getpid()}\n".encode())
            return file
        file.close()


@contextmanager
def _own(path: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """A new file beside ``path``, locked as a sign that its writer lives; gone at the end if it was not moved."""
    while True:
        half = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PART}")
        file = half.open("xb")
        try:
            if fcntl is not None:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX)  # waits for a sweeper that has it: then the file is gone
                if not _still_there(file, half):  # somebody swept it away before it was locked
                    continue
            yield half, file
            return
        finally:
            file.close()
            half.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Take away what killed writers of this file left."""
    for half in path.parent.iterdir():
        name = half.name
        if not (name.startswith(f".{path.name}.") and name.endswith(_PART)):
            continue
        with suppress(OSError), half.open("rb") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its writer lives, if this fails
            half.unlink()


def _still_there(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
