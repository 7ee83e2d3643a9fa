"""Atomic file writes, and locks: of files that several append to, of folders that only one run may write at a time."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .errors import FolderInUse, S2TError

try:
    import fcntl
except ImportError:  # Windows: open files cannot be deleted, and there is no lock between runs
    fcntl = None  # type: ignore[assignment]

LOCK = ".run.lock"
_PART_SUFFIX = ".part"
_LOOK_S = 0.005


def write_whole(path: Path, data: bytes) -> None:
    """Create or replace a file atomically: written to a temporary file, synced to disk, renamed.

    The folder is created if missing. Several writers may write the same file; the last rename wins. Temporary files of
    killed writers are removed.

    Raises:
        S2TError: naming the file and the system's error; an existing file is unchanged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale_parts(path)
        with _new_part_file(path) as (part_file, file):
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            part_file.replace(path)
    except OSError as error:
        raise S2TError(
            f"{path} could not be written: {error.strerror}.", hint="What was written before is kept; run again."
        ) from error


def lock_to_append(file: IO[bytes], until: float) -> None:
    """Take an open file's lock, which closing it gives back; without effect where the system has none.

    Args:
        file: what several processes append to.
        until: when to give up, in seconds of ``time.monotonic()``: a stopped process may hold the lock for ever.

    Raises:
        TimeoutError: another process kept it locked.
        OSError: the file system has no locks.
    """
    while fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise TimeoutError("another process kept it locked") from None
            time.sleep(_LOOK_S)


@contextmanager
def sole_run(folder: Path) -> Iterator[None]:
    """Exclusive lock on a folder, for all processes of this machine; the folder is created if missing.

    Raises:
        FolderInUse: another run holds the lock; nothing was changed.
        S2TError: the folder cannot be created or written.
    """
    if fcntl is None:
        yield
        return
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _acquire_lock(folder / LOCK)
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


def _acquire_lock(path: Path) -> IO[bytes]:
    """Open and lock the lock file; retries if its last holder has just deleted it."""
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
        if _is_same_file(file, path):
            file.truncate(0)
            file.write(f"{os.getpid()}\n".encode())
            return file
        file.close()


@contextmanager
def _new_part_file(path: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """A temporary file next to ``path``, locked while its writer lives; deleted at the end unless it was renamed."""
    while True:
        part_file = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PART_SUFFIX}")
        file = part_file.open("xb")
        try:
            if fcntl is not None:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX)  # waits for a cleaner that holds the lock: then the file is gone
                if not _is_same_file(file, part_file):  # removed by a cleaner before it was locked
                    continue
            yield part_file, file
            return
        finally:
            file.close()
            part_file.unlink(missing_ok=True)


def _remove_stale_parts(path: Path) -> None:
    """Remove temporary files of killed writers of this file."""
    for part_file in path.parent.iterdir():
        name = part_file.name
        if not (name.startswith(f".{path.name}.") and name.endswith(_PART_SUFFIX)):
            continue
        with suppress(OSError), part_file.open("rb") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if its writer lives
            part_file.unlink()


def _is_same_file(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
