"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import S2TError


def write_whole(path: Path, data: bytes) -> None:
    """Make or replace a file in one move, on disk before it counts; its folder is made where it is missing.

    Raises:
        S2TError: naming the file and what the system said; what stood there before stands.
    """
    half = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with half.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            half.replace(path)
        except OSError:
            half.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise S2TError(
            f"{path} could not be written: {error.strerror}.", hint="What was written before is kept; run again."
        ) from error
