"""Python programs that start at once: forked from a process that has loaded the libraries, which takes seconds.

Each is a real process, with memory, limits and an end of its own: to kill, to starve, to read the output of.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import runpy
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "langchain.agents",
        "transformers.models.qwen3.modeling_qwen3",
        "s2t_agents.chat.chat_model",
        "s2t_agents.cli",
        "s2t_agents.demo.agent",
        "s2t_agents.chat.runtime",
        "s2t_agents.training.pipeline",
    ]
)


def start(*words: str, stdin: str = "", out: str = os.devnull, error: str = os.devnull) -> BaseProcess:
    """``python words...`` on one thread.

    Args:
        words: a file, or ``-c`` and code, and arguments.
        stdin: what it is told.
        out: the file that its output goes to.
        error: and what it says on standard error.
    """
    process = _CONTEXT.Process(target=_python, args=(words, stdin, out, error))
    process.start()
    return process


def run(*words: str, stdin: str = "", timeout_s: float = 200.0) -> CompletedProcess[str]:
    """``python words...`` to its end."""
    with TemporaryDirectory() as folder:
        out, error = Path(folder, "out"), Path(folder, "error")
        process = start(*words, stdin=stdin, out=str(out), error=str(error))
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"{words} still ran after {timeout_s:g} s: {error.read_text()}")
        return CompletedProcess(words, process.exitcode, out.read_text(), error.read_text())


def _python(words: tuple[str, ...], stdin: str, out: str, error: str) -> None:
    import torch

    for path, number in ((out, 1), (error, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = io.StringIO(stdin)
    torch.set_num_threads(1)
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = list(words)
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
