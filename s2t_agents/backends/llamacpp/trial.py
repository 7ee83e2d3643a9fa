"""A GGUF file is tried out in a process of its own before this one loads it.

llama.cpp trusts a file: hundreds of its assertions, and its arithmetic, depend on what the metadata say, and where one
fails the process ends. So another process loads the file first, looks at every weight, and reads two tokens. It
shares the file's pages with this one, so that what it has read is in memory already.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np

from ...errors import ConfigError, ModelNotFound, UnsafeWeights
from ...fork_safety import hold_while_forking
from .context import Context, Options
from .gguf_header import GGUFHeader, read_header

LEAST_S = 60.0
"""Seconds that a trial may take, whatever the file's size."""

BYTES_PER_S = 20e6
"""And a second more for so many bytes: a slow disk's."""

SPACE = 16 * 2**30
"""Address space of the trial's process beside the file itself."""

REFUSED, NO_MODEL = 3, 4
"""Exit codes; the last line of its output is the reason."""

_tried: set[tuple[tuple[str, int, int, int], ...]] = set()
_lock = threading.Lock()
hold_while_forking(sys.modules[__name__], "_lock")


def try_out(header: GGUFHeader) -> None:
    """Load a model in another process, once for each state of its files.

    Raises:
        ModelNotFound: an architecture that llama.cpp does not know, or no language model.
        UnsafeWeights: llama.cpp refuses it, ends over it, takes for ever, or says NaN.
    """
    state = tuple(_state(file) for file in header.files)
    with _lock:
        if state in _tried:
            return
    said = _run(header)
    if said is not None:
        raise said
    with _lock:
        _tried.add(state)


def _state(file: Path) -> tuple[str, int, int, int]:
    found = file.stat()
    return str(file.resolve()), found.st_ino, found.st_size, found.st_mtime_ns


def _run(header: GGUFHeader) -> ConfigError | None:
    """What the trial's process made of the file; None where it is sound."""
    path, limit = str(header.path), LEAST_S + header.nbytes / BYTES_PER_S
    package = Path(__file__).parents[3]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(package), *(each for each in sys.path if each)]),
        "GGML_NO_BACKTRACE": "1",
        "PYTHONFAULTHANDLER": "",
    }
    command = [sys.executable, "-P", "-m", __name__, path]
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return UnsafeWeights(
            f"llama.cpp is not done with {path!r} after {limit:.0f} s.", hint="Copy or download it again."
        )
    if not done.returncode:
        return None
    lines = done.stderr.decode(errors="replace").strip().splitlines() or ["it does not say why"]
    if done.returncode in (REFUSED, NO_MODEL):
        return (ModelNotFound if done.returncode == NO_MODEL else UnsafeWeights)(lines[-1])
    how = f"signal {signal.Signals(-done.returncode).name}" if done.returncode < 0 else f"status {done.returncode}"
    said = next((line for line in reversed(lines) if "GGML_ASSERT" in line or "error" in line.lower()), lines[-1])
    return UnsafeWeights(
        f"llama.cpp ends with {how} over {path!r}: {said[max(0, said.find('GGML_ASSERT')) :]:.300}.",
        hint="Copy or download it again.",
    )


def main(path: str) -> int:
    """The trial itself; returns the exit code."""
    try:
        header = read_header(path)
        _bound(sum(file.stat().st_size for file in header.files))
        context = Context(header, Options(n_ctx=256, n_gpu_layers=0, n_threads=1), sequences=2, check=True)
        outputs = context.decode([([0, min(1, context.vocab_size - 1)], 0, 0)])
    except ModelNotFound as error:
        print(error, file=sys.stderr)
        return NO_MODEL
    except (ConfigError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return REFUSED
    if not all(np.isfinite(each).all() for each in outputs):
        print(f"{path!r} computes NaN or infinite values. Copy or download it again.", file=sys.stderr)
        return REFUSED
    return 0


def _bound(size: int) -> None:
    """Limits of this process: memory that a number in the metadata could ask for, and no core dump."""
    with suppress(ImportError, ValueError, OSError):  # not on every system
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (2 * size + SPACE, 2 * size + SPACE))


if __name__ == "__main__":
    status = main(sys.argv[1])
    sys.stderr.flush()
    os._exit(status)  # the library's own farewells do not matter
