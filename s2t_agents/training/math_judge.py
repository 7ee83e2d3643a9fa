"""math-verify in a process of its own, which is stopped when it takes too long.

Its own limits are signals: they fail outside the main thread, disturb other users of the alarm, and cannot stop one
long operation of C code. A process can always be ended.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

from ..errors import S2TError
from ..fork_safety import hold_while_forking, renew_in_child

LIMIT_S = 5.0
"""Seconds for one comparison; what takes longer counts as not equal."""

START_S = 120.0
"""Seconds for the library to load."""

WORKER = Path(__file__).with_name("math_worker.py")


class MathJudge:
    """Asks one worker process at a time; a worker that was stopped or broke is replaced. Thread-safe.

    Args:
        limit_s: seconds for one comparison; may be set later.
    """

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self.limit_s = limit_s
        self._lock = threading.Lock()
        hold_while_forking(self, "_lock")
        self._worker: subprocess.Popen[str] | None = None
        renew_in_child(self._forget)

    @property
    def worker_pid(self) -> int | None:
        """The process that compares; None before the first question and after one that took too long."""
        worker = self._worker
        return worker.pid if worker is not None else None

    def equal(self, gold: str, said: str) -> bool:
        """Whether ``said`` is the same as ``gold``; no where that cannot be told in time.

        Raises:
            S2TError: the worker cannot be started.
        """
        with self._lock:
            if self._worker is None:
                self._worker = self._started()
            answer = self._ask(self._worker, json.dumps([gold, said]), self.limit_s)
            if answer is None:
                self._end()
            return answer == "true"

    def close(self) -> None:
        """End the worker; the next question starts another."""
        with self._lock:
            self._end()

    def _started(self) -> subprocess.Popen[str]:
        # -P: the folder of the script holds a module named as one of the standard library
        command = [sys.executable, "-P", str(WORKER)]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        if self._ask(worker, "[]", START_S) != "ready":
            self._worker = worker
            self._end()
            raise S2TError(
                f"the process that grades with math-verify could not be started (exit code {worker.returncode}).",
                hint="Its message stands above. Is math-verify installed as it should be?",
            )
        return worker

    def _ask(self, worker: subprocess.Popen[str], question: str, seconds: float) -> str | None:
        """One line out, one line back; None when the worker broke or had to be stopped."""
        assert worker.stdin is not None
        assert worker.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            worker.kill()

        timer = threading.Timer(seconds, stop)
        timer.daemon = True
        timer.start()
        try:
            worker.stdin.write(question + "\n")
            worker.stdin.flush()
            answer = worker.stdout.readline().strip()
        except OSError:  # it died before it had read the question
            answer = ""
        finally:
            timer.cancel()
            timer.join()
        return None if late.is_set() or not answer else answer

    def _forget(self) -> None:
        self._worker = None  # the parent's: a child that asked it would take the parent's answers

    def _end(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            worker.communicate()


@cache
def shared_judge() -> MathJudge:
    """The judge of this process."""
    judge = MathJudge()
    atexit.register(judge.close)
    return judge
