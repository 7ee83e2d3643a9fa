"""Shared by all tests: one thread, no hub, no network beyond this machine."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("LANGSMITH_TRACING", "false")

import gc
import socket
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from benchmarks import assets

if TYPE_CHECKING:
    from servers import CompletionServer


def pytest_collection_finish() -> None:
    """Modules and tests stay to the end: no garbage collection looks at them again."""
    gc.collect()
    gc.freeze()


hypothesis.settings.register_profile("no clock", deadline=None)  # a busy machine fails no test
hypothesis.settings.load_profile("no clock")

LOOPBACK = ("127.", "localhost", "::1")


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and not str(address[0]).startswith(LOOPBACK):
            raise RuntimeError(f"a test tried to reach {address!r}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The addresses of all connections that are begun from now on."""
    begun: list[Any] = []
    connect = socket.socket.connect

    def counted(self: socket.socket, address: Any) -> None:
        begun.append(address)
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", counted)
    return begun


@pytest.fixture
def server() -> Iterator[CompletionServer]:
    """A completions server on loopback over a tiny LLM."""
    from servers import serving

    from s2t_agents.testing import tiny_model

    with serving(tiny_model(seed=5)) as running:
        yield running


def real(name: str) -> Path:
    """The folder of a real asset; a test that needs it is skipped where the cache lacks it."""
    try:
        return assets.folder(name)
    except assets.Unavailable as reason:
        pytest.skip(str(reason))


@cache
def loaded_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(params=[*assets.TOKENIZERS, "smollm2"])
def real_tokenizer(request: pytest.FixtureRequest) -> Any:
    """Each of the real tokenizers, with its chat template (gpt4o has none); ``name_or_path`` is its folder."""
    return loaded_tokenizer(real(request.param))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a checkpoint folder, fp32."""
    return real("smollm2")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as it is published: one GGUF file of 4 bits."""
    return real("smollm2-gguf") / assets.GGUF


@pytest.fixture(scope="session")
def gemma3_270m() -> Path:
    """Gemma-3-270M, the base model, as a checkpoint folder, bf16; it has no chat template."""
    return real("gemma3-270m")


@pytest.fixture(scope="session")
def gemma3_270m_gguf() -> Path:
    """The same as one GGUF file of 4 bits."""
    return real("gemma3-270m-gguf") / assets.GEMMA


@pytest.fixture(scope="session")
def bfcl() -> Path:
    """Data of the Berkeley Function Calling Leaderboard: ``BFCL_v4_*.json``, JSON lines, and ``possible_answer/``."""
    return real("bfcl")


@pytest.fixture
def bfcl_checker() -> Path:
    """The leaderboard's own ``ast_checker.py``."""
    return real("bfcl-checker") / "ast_checker.py"
