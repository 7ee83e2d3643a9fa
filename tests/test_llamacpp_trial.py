"""Files whose header is sound and over which llama.cpp itself fails: one error, and this process goes on."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import write_gguf

from s2t_agents.backends.llamacpp.context import Context
from s2t_agents.backends.llamacpp.gguf_header import read_header
from s2t_agents.backends.llamacpp.trial import try_out
from s2t_agents.errors import ConfigError, ModelNotFound, UnsafeWeights

pytest.importorskip("llama_cpp")

U64 = struct.Struct("<Q")


def tried(path: Path) -> None:
    try_out(read_header(path))


def test_a_sound_file_is_tried_once_and_again_when_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []

    def counted(*args: Any, **options: Any) -> Any:
        started.append(args)
        return run(*args, **options)

    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", counted)
    file = write_gguf(tmp_path / "a.gguf")
    tried(file)
    tried(file)
    assert len(started) == 1
    write_gguf(file, without=("blk.1.ffn_up.weight",))
    with pytest.raises(UnsafeWeights, match=r"blk\.1\.ffn_up\.weight"):
        tried(file)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention.head_count": 0},
        {"attention.head_count_kv": 3},
        {"attention.head_count_kv": 2**31},
        {"attention.head_count": 5},
        {"block_count": 3},
        {"block_count": 4000},
        {"embedding_length": 96},
        {"feed_forward_length": 2**31},
        {"expert_count": 2**31, "expert_used_count": 7},
        {"expert_count": 1},
        {"nextn_predict_layers": 7},
        {"rope.dimension_count": 7},
    ],
    ids=str,
)
def test_sizes_over_which_llama_cpp_ends_are_one_error(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UnsafeWeights, match=r"a\.gguf"):
        tried(write_gguf(tmp_path / "a.gguf", metadata=changes))


def with_one(value: float) -> Callable[[str, np.ndarray], np.ndarray]:
    def changed(name: str, values: np.ndarray) -> np.ndarray:
        if name == "blk.1.ffn_down.weight":
            values[3, 5] = value
        return values

    return changed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_found(value: float, tmp_path: Path) -> None:
    with pytest.raises(UnsafeWeights, match=r"blk\.1\.ffn_down\.weight|invalid data|NaN"):
        tried(write_gguf(tmp_path / "a.gguf", weights=with_one(value)))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_a_scale_that_is_no_number_is_found(kind: str, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "a.gguf", kind=kind)
    _, info = read_header(file).tensors["blk.0.attn_q.weight"]
    with file.open("r+b") as opened:
        opened.seek(info.offset + info.nbytes // 2)
        opened.write(np.full(1, np.nan, dtype=np.float16).tobytes())
    with pytest.raises(UnsafeWeights):
        tried(file)


def test_weights_that_overflow_are_found(tmp_path: Path) -> None:
    def huge(name: str, values: np.ndarray) -> np.ndarray:
        return values * 1e30 if name.endswith(("ffn_up.weight", "ffn_gate.weight", "ffn_down.weight")) else values

    with pytest.raises(UnsafeWeights, match="NaN or infinite"):
        tried(write_gguf(tmp_path / "a.gguf", weights=huge))


def test_an_architecture_of_tomorrow_is_no_model_here(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "a.gguf")
    length = U64.pack(5)
    data = file.read_bytes().replace(b"llama.", b"LLAMA.").replace(length + b"llama", length + b"LLAMA")
    file.write_bytes(data)
    with pytest.raises(ModelNotFound, match="architecture 'LLAMA'"):
        tried(file)


@pytest.mark.slow
@pytest.mark.parametrize(
    "key",
    [
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.sliding_window",
        "block_count",
        "context_length",
        "embedding_length",
        "expert_count",
        "nextn_predict_layers",
        "rope.dimension_count",
        "vocab_size",
    ],
)
def test_what_passes_the_trial_loads_and_reads_here(key: str, tmp_path: Path) -> None:
    for value in (0, 1, 7, 2**31, 2**32 - 1):
        with suppress(ConfigError):
            header = read_header(write_gguf(tmp_path / "a.gguf", metadata={key: value}))
            try_out(header)
            logits, hidden = Context(header).decode([([1, 2, 3], 0, 0)])
            assert np.isfinite(logits).all()
            assert np.isfinite(hidden).all()
