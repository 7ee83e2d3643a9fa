"""The binding's own server (``llama_cpp.server``) in a process of its own, asked by HTTP on loopback, greedy.

It answers one request at a time and keeps the KV of the last prompt only.
"""

from __future__ import annotations

import math
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import httpx

NEEDED = ("fastapi", "sse_starlette", "starlette_context", "pydantic_settings", "uvicorn")
"""What ``llama-cpp-python[server]`` brings along."""

PATIENCE_S = 120.0


def available() -> bool:
    """Whether its packages are there."""
    return all(find_spec(name) for name in NEEDED)


class LlamaServer:
    """A server that runs until ``close``.

    Args:
        path: of the GGUF file.
        cells: tokens of context.
        threads: of the CPU.
        banned: tokens that would end an answer.
    """

    def __init__(self, path: Path, *, cells: int, threads: int, banned: Sequence[int]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._bias = {str(token): -100.0 for token in banned}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        options = {"model": path, "host": "127.0.0.1", "port": port, "n_ctx": cells, "n_threads": threads}
        options |= {"n_threads_batch": threads, "interrupt_requests": False, "verbose": False}
        command = [sys.executable, "-m", "llama_cpp.server"]
        command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}/v1", timeout=PATIENCE_S)
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until and self._process.poll() is None:
            try:
                self._client.get("/models").raise_for_status()
                return
            except httpx.TransportError:
                time.sleep(0.1)
        self._log.seek(0)
        raise RuntimeError(f"llama_cpp.server did not start: {self._log.read().decode(errors='replace')[-500:]}")

    def answer(self, prompt: str, tokens: int) -> list[float]:
        """A streamed completion: when each token came."""
        asked = {"prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "stream": True, "logit_bias": self._bias}
        with self._client.stream("POST", "/completions", json=asked) as answer:
            answer.raise_for_status()
            return [
                time.perf_counter()
                for line in answer.iter_lines()
                if line.startswith("data: {") and '"finish_reason":null' in line.replace(" ", "")
            ]

    def cpu_s(self) -> float:
        """CPU time of the server's threads so far (Linux); NaN where the system does not tell it."""
        try:
            tasks = list(Path(f"/proc/{self._process.pid}/task").iterdir())
            return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
        except OSError:
            return math.nan

    def close(self) -> None:
        """End the process."""
        self._client.close()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
