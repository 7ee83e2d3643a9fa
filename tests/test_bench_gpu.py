"""The GPU bench: the same code on the CPU, in seconds; without a GPU it says so; a part cut off keeps its findings."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import forked
import pytest
import torch

from benchmarks import agreement, gpu
from benchmarks.device import bytes_per_token, share_of_limit
from benchmarks.shapes import measured_model
from s2t_agents.errors import ConfigError
from s2t_agents.testing import tiny_model


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[int]]:
    seen: list[int] = []
    result = gpu.run("cpu", "tiny", keep=lambda so_far: seen.append(len(json.dumps(so_far))))
    return result, seen


def test_every_part_runs_on_the_cpu_and_finishes(outcome: tuple[dict[str, Any], list[int]]) -> None:
    result, kept = outcome
    assert {name: part.get("error") for name, part in result["parts"].items()} == dict.fromkeys(gpu.BUDGET_S)
    assert all(part["finished"] for part in result["parts"].values())
    assert result["correct"]
    assert result["graphs"]
    assert kept == sorted(kept)  # what was found is never lost again
    assert kept[0] < kept[1] < kept[2]
    assert all(0 < limit["share_of_copy"] < 1 for limit in result["memory_limit"].values())
    assert result["nominal_gb_s"] is None  # of a CPU nothing is known
    assert len(list(gpu.lines(result))) > 8


def empty(budget_s: float) -> dict[str, Any]:
    return {"budget_s": budget_s, "found": [], "finished": False}


def test_the_parts_fit_into_eight_minutes() -> None:
    assert sum(gpu.BUDGET_S.values()) <= 480


def test_a_device_that_says_something_else_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    assert agreement.run("qwen3", torch.device("cpu"))["passed"]
    selectors, shifts = agreement.selectors, iter(range(3))

    def unlike(model: Any) -> Any:
        made = selectors(model)
        shift, scores = next(shifts), made["head"].scores
        made["head"].scores = lambda proposal: scores(proposal) + shift  # type: ignore[method-assign]
        return made

    monkeypatch.setattr(agreement, "selectors", unlike)
    found = agreement.run("qwen3", torch.device("cpu"))
    assert found["tokens_equal"]
    assert found["tokens_equal_in_turns"]
    assert found["captured"]["prefill"]
    assert not found["passed"]


def test_a_part_that_takes_too_long_is_cut_off_and_keeps_what_it_found() -> None:
    def slow() -> Iterator[dict[str, Any]]:
        yield {"first": 1}
        threading.Event().wait()
        yield {"second": 2}

    part = empty(0.2)
    gpu.measure(part, slow(), lambda: None)
    assert (part["found"], part["finished"], part["cut_off"]) == ([{"first": 1}], False, True)


def test_an_error_ends_its_part_only() -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield {"first": 1}
        raise ValueError("no such kernel")

    part = empty(5)
    gpu.measure(part, broken(), lambda: None)
    assert part["found"] == [{"first": 1}]
    assert part["error"] == "ValueError: no such kernel"


@pytest.mark.parametrize(
    ("device", "shape"), [("cuda:99", "tiny"), ("nonsense", "tiny"), ("mps", "tiny"), ("cpu", "9b")]
)
def test_what_is_not_there_is_named(device: str, shape: str) -> None:
    with pytest.raises(ConfigError, match=shape if device == "cpu" else device):
        gpu.run(device, shape)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_cuda_the_command_says_so_in_one_line_and_fails() -> None:
    done = forked.run("-c", "from s2t_agents.cli import main; main()", "bench", "gpu", "--json")
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "0 CUDA devices" in done.stderr


def test_the_weights_of_a_step_count_a_tied_output_layer_once() -> None:
    model = measured_model("tiny", dtype=torch.bfloat16)
    embedding = model.model.get_input_embeddings().weight
    rest = sum(weight.nbytes for weight in model.torch_backend.decoder.parameters()) - embedding.nbytes
    assert bytes_per_token(model) == rest + model.output_embedding.nbytes
    tied = tiny_model("qwen2", tie_word_embeddings=True)
    assert bytes_per_token(tied) == sum(weight.nbytes for weight in tied.model.parameters())
    limit = share_of_limit(model, 2.0, {"copy_gb_s": bytes_per_token(model) / 1e6, "nominal_gb_s": None})
    assert (limit["share_of_copy"], limit["share_of_nominal"]) == (pytest.approx(0.5), None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", agreement.models())
def test_a_gpu_says_what_the_cpu_says(name: str) -> None:
    found = agreement.run(name, torch.device("cuda"))
    assert found["passed"], found
