"""The binding ``llama-cpp-python``: imported when the first GGUF model is loaded, its log led into Python's own."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from ...errors import ConfigError

logger = logging.getLogger(__name__)

MOST_SAID = 20
"""Lines of complaint that are kept for an error."""

ERROR = 4
"""llama.cpp's level of errors. Its messages are for debugging only: errors are raised."""

GPUS = {"cuda": ("CUDA", "ROCm", "MUSA"), "mps": ("Metal", "MTL"), "vulkan": ("Vulkan",), "xpu": ("SYCL",)}
"""llama.cpp's names of what it is compiled for, by torch's of the device."""

_said = threading.local()


@cache
def library() -> Any:
    """The module of the C interface.

    Raises:
        ConfigError: the package is missing, or of another version than this one needs.
    """
    try:
        from llama_cpp import llama_cpp as module
    except Exception as error:  # the shared library's own dependencies may be missing, too
        raise ConfigError(
            f"GGUF models need llama-cpp-python, which cannot be imported: {error}.",
            hint="pip install 's2t-agents[llamacpp]'",
        ) from error
    lacking = [name for name in ("llama_memory_seq_cp", "llama_set_embeddings") if not hasattr(module, name)]
    if lacking:
        raise ConfigError(f"llama-cpp-python is too old: it lacks {lacking[0]}.", hint="Upgrade to 0.3.36 or newer.")
    module.llama_log_set(_callback(module), None)
    module.llama_backend_init()
    return module


def offloads_to(kind: str) -> bool:
    """Whether layers may be on a device of this kind, by torch's name: llama.cpp is compiled for it, and there is one.

    Raises:
        ConfigError: see ``library``.
    """
    module = library()
    system = module.llama_print_system_info().decode(errors="replace")
    return bool(module.llama_supports_gpu_offload()) and any(f"{name} : " in system for name in GPUS.get(kind, ()))


@cache
def _callback(module: Any) -> Any:
    """What llama.cpp calls for each line; kept for ever, since it may do so until the process ends."""

    def heard(level: int, text: bytes, _: Any) -> None:
        line = (text or b"").decode(errors="replace").strip()
        if level == ERROR and (kept := getattr(_said, "lines", None)) is not None and len(kept) < MOST_SAID:
            kept.append(line)
        if line and logger.isEnabledFor(logging.DEBUG):
            logger.debug(line)

    return module.llama_log_callback(heard)


@contextmanager
def complaints() -> Iterator[list[str]]:
    """Errors that llama.cpp reports in this thread inside the block."""
    outer, _said.lines = getattr(_said, "lines", None), []
    try:
        yield _said.lines
    finally:
        _said.lines = outer


@cache
def stop_flag_reader() -> Any:
    """A C function for llama.cpp's abort callback: ``strlen``, which is 0 of an empty text and 1 of one letter.

    It is called before every node of the graph; a function of Python's would take the GIL each time.
    """
    module = library()
    address = ctypes.cast(ctypes.CDLL(None).strlen, ctypes.c_void_p).value
    return module.ggml_abort_callback(address)
