"""Concurrent steps share forwards: same results as alone, nobody hangs, nobody pays for another's mistake."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from s2t_agents import Engine
from s2t_agents.models.language_model import LanguageModel
from s2t_agents.models.packed import Segment
from s2t_agents.models.prefix import Prefix
from s2t_agents.testing import RECURRENT, tiny_model
from s2t_agents.types import Sampling


def together(*jobs: Callable[[], object]) -> list[object]:
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(timeout=60) for future in [pool.submit(job) for job in jobs]]


def greedy(model: LanguageModel, seed: int, count: int) -> list[int]:
    prompt = torch.randint(0, 250, (3 + 11 * seed,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [step.token_id for step in Engine(model).steps(prompt, Sampling(max_tokens=count))]


def widths(model: LanguageModel) -> list[list[int]]:
    """Writes down, from now on, the tokens of each sequence in each forward."""
    seen: list[list[int]] = []
    single, packed = model.owner._single, model.owner._packed

    def one(segment: Segment) -> object:
        seen.append([len(segment.ids)])
        return single(segment)

    def many(segments: list[Segment]) -> object:
        seen.append([len(segment.ids) for segment in segments])
        assert packed is not None
        return packed(segments)

    model.owner._single = one  # type: ignore[assignment]
    if packed:
        model.owner._packed = many  # type: ignore[assignment]
    return seen


@pytest.mark.parametrize("name", ["qwen3", "gemma3", *RECURRENT])
def test_eight_generations_at_once_say_what_each_says_alone(name: str) -> None:
    model = tiny_model(name)
    alone = [greedy(model, seed, 20) for seed in range(8)]
    assert together(*[lambda seed=seed: greedy(model, seed, 20) for seed in range(8)]) == alone


def test_generations_that_run_at_once_fall_into_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s2t_agents.models.owner.PATIENCE", 1e6)
    monkeypatch.setattr("s2t_agents.models.owner.PATIENCE_S", 0.5)
    model = tiny_model("qwen3")
    seen = widths(model)
    together(*[lambda seed=seed: greedy(model, seed, 40) for seed in range(6)])
    assert len(seen) < 0.6 * 6 * 40  # alone it would be a forward per token
    assert max(map(len, seen)) > 3


def test_a_long_prompt_goes_in_parts_beside_the_tokens_of_others() -> None:
    model = tiny_model("qwen3")
    seen = widths(model)
    long = torch.randint(0, 250, (1200,), generator=torch.Generator().manual_seed(3)).tolist()
    read = threading.Event()

    def decode() -> int:
        prefix = Prefix(model)
        prefix.extend([1, 2, 3])
        steps = 0
        while not read.is_set():
            prefix.extend([int(prefix.logits.argmax())])
            steps += 1
        return steps

    def prefill() -> torch.Tensor:
        time.sleep(0.05)
        prefix = Prefix(model)
        try:
            prefix.extend(long)
        finally:
            read.set()
        return prefix.logits

    steps, logits = together(decode, prefill)
    assert isinstance(logits, torch.Tensor)
    assert torch.allclose(logits, model.model(torch.tensor([long])).logits[0, -1], atol=1e-4)
    assert all(sum(width for width in forward if width > 1) <= 256 for forward in seen if len(forward) > 1)
    assert sum(1 in forward and max(forward) > 1 for forward in seen) >= 2
    assert isinstance(steps, int)


def test_a_step_that_fails_tells_its_own_caller_alone() -> None:
    model = tiny_model("qwen3")
    outcomes: list[str] = []

    def good(seed: int) -> list[int]:
        return greedy(model, seed, 30)

    def bad() -> None:
        for _ in range(10):
            prefix = Prefix(model)
            prefix.extend([1, 2])
            with pytest.raises(IndexError):
                prefix.extend([10**6])
            assert prefix._cache.get_seq_length() == len(prefix) == 2
            outcomes.append("told")

    alone = [good(seed) for seed in (0, 1)]
    assert together(lambda: good(0), bad, lambda: good(1)) == [alone[0], None, alone[1]]
    assert len(outcomes) == 10


def test_random_pauses_and_early_closes_leave_the_others_as_they_are() -> None:
    model = tiny_model("qwen3")
    alone = [greedy(model, seed, 25) for seed in range(6)]

    def wander(seed: int) -> list[int]:
        rng = random.Random(seed)
        prompt = torch.randint(0, 250, (3 + 11 * seed,), generator=torch.Generator().manual_seed(seed)).tolist()
        got = []
        steps = Engine(model).steps(prompt, Sampling(max_tokens=25))
        for step in steps:
            got.append(step.token_id)
            if rng.random() < 0.1:
                time.sleep(0.005)
            if seed % 2 and rng.random() < 0.08:
                break
        steps.close()
        return got

    for seed, got in enumerate(together(*[lambda seed=seed: wander(seed) for seed in range(6)])):
        assert isinstance(got, list)
        assert got == alone[seed][: len(got)]
        assert seed % 2 or len(got) == len(alone[seed])
    assert not model.owner._waiting
    assert not model.owner._led


def test_an_exclusive_turn_steps_at_once_while_others_wait() -> None:
    model = tiny_model("qwen3")
    expected = greedy(model, 1, 15)

    def exclusive() -> None:
        for _ in range(20):
            prefix = Prefix(model)
            with model.lock:
                prefix.extend([1, 2, 3])
                prefix.extend([4])

    assert together(exclusive, lambda: greedy(model, 1, 15))[1] == expected
