"""The bench of engines runs through, on the same weights in every engine, and joins what was stored."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import write_gguf
from training_fixtures import save_model

from benchmarks import engines, engines_report, llama_server
from s2t_agents.testing import tiny_model

pytest.importorskip("llama_cpp")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("engines")
    gguf = write_gguf(folder / "tiny.gguf", metadata={"context_length": 2048})
    checkpoint = save_model(tiny_model("llama"), folder / "checkpoint")
    return engines.run(gguf, checkpoint, quick=True)


def test_every_engine_is_there_beside_bare_llama_cpp(quick: dict[str, Any]) -> None:
    everywhere = {"llama.cpp", "ours, llama.cpp", "ours, chat", "ours, chat, tool called"}
    everywhere |= {f"{who} {dtype}" for who in ("ours, torch", "generate") for dtype in ("fp32", "bf16")}
    heads = {"ours, llama.cpp, head at 1%", "ours, llama.cpp, head at 10%"}
    server = {"llama.cpp's server"} if llama_server.available() else set()
    for part in quick["rows"].values():
        assert set(part["at_once"]["1"]) == everywhere | heads | server
        assert set(part["at_once"]["2"]) == everywhere
        for rows in part["at_once"].values():
            assert rows["llama.cpp"]["over_bare"] == 1
            assert all(row["tokens_per_s"] > 0 and row["cpu_ms"] > 0 for row in rows.values())
    assert set(quick["first_token_ms"]["24"]) == everywhere | (
        {"llama.cpp's server"} if llama_server.available() else set()
    )
    assert set(quick["memory_mb"]) == {"llama.cpp", "ours, llama.cpp", "ours, torch fp32", "ours, torch bf16"}
    assert min(quick["memory_mb"].values()) > 10
    assert engines_report.table(quick).renderables
    page = engines_report.markdown(quick, {"hardware": "2 cores", "commit": "abc", "date": "today", "command": "this"})
    assert "| ours, llama.cpp, head at 1% |" in page
    assert "commit abc" in page
    loaded = engines_report.markdown(quick, {"hardware": "", "commit": "", "date": "", "command": "", "load": "20"})
    assert "first token" not in loaded


def test_lengths_of_prompts_that_another_run_measured_stay(quick: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "engines.json"
    stored = {"24": {"at_once": {"8": {}}}, "128": {"at_once": {}}}
    engines.joined({**quick, "rows": stored, "first_token_ms": {"24": {}, "128": {}}}, file)
    engines.joined(copy.deepcopy(quick), file)
    rows = json.loads(file.read_text())["rows"]
    assert list(rows) == ["24", "40", "128"]
    assert list(rows["24"]["at_once"]) == ["1", "2", "8"]
