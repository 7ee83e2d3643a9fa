"""Concurrent steps share forwards: same results as alone, nobody hangs, nobody pays for another's mistake."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from sequences import read, scored_after
from torch_models import watched_forwards

from s2t_agents import Engine
from s2t_agents.backends.base import ScoreCandidates, Work
from s2t_agents.backends.torch.lora import Lora
from s2t_agents.engine.engine import steps_of
from s2t_agents.proposal import Proposal
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.scheduling.requests import AppendRequest
from s2t_agents.scheduling.sequence import TokenSequence
from s2t_agents.scheduling.waits import gather
from s2t_agents.selectors import ActivatedSelector
from s2t_agents.testing import RECURRENT, tiny_model
from s2t_agents.triggers import Trigger, always, when
from s2t_agents.types import Sampling, Step


def together(*jobs: Callable[[], object]) -> list[object]:
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(timeout=60) for future in [pool.submit(job) for job in jobs]]


def greedy(model: LanguageModel, seed: int, count: int) -> list[int]:
    prompt = torch.randint(0, 250, (3 + 11 * seed,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [step.token_id for step in Engine(model).steps(prompt, Sampling(max_tokens=count))]


def widths(model: LanguageModel) -> list[list[int]]:
    """Writes down, from now on, the tokens of each sequence in each forward."""
    seen: list[list[int]] = []
    watched_forwards(model, lambda batch: seen.append([len(item.ids) for item in batch]))
    return seen


@pytest.mark.parametrize("name", ["qwen3", "gemma3", *RECURRENT])
def test_eight_generations_at_once_say_what_each_says_alone(name: str) -> None:
    model = tiny_model(name)
    alone = [greedy(model, seed, 20) for seed in range(8)]
    assert together(*[lambda seed=seed: greedy(model, seed, 20) for seed in range(8)]) == alone


def test_generations_that_run_at_once_fall_into_step(monkeypatch: pytest.MonkeyPatch) -> None:
    patient(monkeypatch)
    model = tiny_model("qwen3")
    seen = widths(model)
    together(*[lambda seed=seed: greedy(model, seed, 40) for seed in range(6)])
    assert len(seen) < 0.6 * 6 * 40  # alone it would be a forward per token
    assert max(map(len, seen)) > 3


def test_what_callers_do_between_forwards_they_do_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    patient(monkeypatch)
    for name, value in (("HAND_OUT", 1e6), ("TURN", 1e6), ("TURN_S", 20.0)):
        monkeypatch.setattr(f"s2t_agents.scheduling.scheduler.{name}", value)
    model = tiny_model("qwen3")
    model.backend.limits = replace(model.backend.limits, hand_over_s=-1.0)  # forwards in the scheduler's thread
    busy: list[object] = []
    most: list[int] = []

    class Slow:
        def scores(self, proposal: Proposal) -> torch.Tensor:
            busy.append(proposal)
            time.sleep(0.001)
            most.append(len(busy))
            busy.pop()
            return proposal.candidate_log_probs

    engine = Engine(model, trigger=always(), selector=Slow())
    answers = together(*[lambda n=n: list(engine.steps([5 + n, 6, 7], Sampling(max_tokens=15))) for n in range(6)])
    assert [len(answer) for answer in answers] == [15] * 6  # type: ignore[arg-type]
    assert max(most) == 1


@pytest.mark.parametrize("idle_s", [0.0, 2.0])
@pytest.mark.parametrize("turn_s", [0.0, 0.001, 0.1])
def test_a_caller_that_stays_away_holds_nobody_up(
    turn_s: float, idle_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s2t_agents.scheduling.scheduler.TURN_S", turn_s)
    monkeypatch.setattr("s2t_agents.scheduling.scheduler.TURN", 1e6)
    monkeypatch.setattr("s2t_agents.scheduling.scheduler.IDLE_S", idle_s)
    patient(monkeypatch)
    model = tiny_model("qwen3")
    model.backend.limits = replace(model.backend.limits, hand_over_s=-1.0)
    alone = [greedy(model, seed, 25) for seed in (3, 1, 2)]
    started, others_ended = threading.Barrier(3), threading.Event()

    def pausing() -> list[int]:
        prompt = torch.randint(0, 250, (36,), generator=torch.Generator().manual_seed(3)).tolist()
        steps = Engine(model).steps(prompt, Sampling(max_tokens=25))
        started.wait(timeout=30)
        got = [next(steps).token_id for _ in range(5)]
        assert others_ended.wait(timeout=30)  # they need none of its steps
        return [*got, *(step.token_id for step in steps)]

    def going_on(seed: int) -> list[int]:
        started.wait(timeout=30)
        return greedy(model, seed, 25)

    def others() -> list[object]:
        both = together(lambda: going_on(1), lambda: going_on(2))
        others_ended.set()
        return both

    assert together(pausing, others) == [alone[0], alone[1:]]


def test_no_forward_is_held_back_for_a_generation_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    patient(monkeypatch, seconds=5.0)
    model = tiny_model("qwen3")
    took_s = []
    for _ in range(3):  # the end of a generation is a hint that a busy lock may swallow
        started = time.monotonic()
        together(lambda: greedy(model, 0, 8), lambda: greedy(model, 1, 30), lambda: greedy(model, 2, 60))
        took_s.append(time.monotonic() - started)
    assert min(took_s) < 5.0


def test_a_long_prompt_goes_in_parts_beside_the_tokens_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    patient(monkeypatch)
    model = tiny_model("qwen3")
    seen = widths(model)
    long = torch.randint(0, 250, (1200,), generator=torch.Generator().manual_seed(3)).tolist()
    done = threading.Event()

    def decode() -> int:
        prefix = read(model, [1, 2, 3])
        steps = 0
        while not done.is_set():
            prefix.append([int(prefix.logits.argmax())])
            steps += 1
        return steps

    def prefill() -> torch.Tensor:
        time.sleep(0.05)
        prefix = TokenSequence(model)
        try:
            prefix.append(long)
        finally:
            done.set()
        return prefix.logits

    steps, logits = together(decode, prefill)
    assert isinstance(logits, torch.Tensor)
    assert torch.allclose(logits, model.model(torch.tensor([long])).logits[0, -1], atol=1e-4)
    assert all(sum(width for width in forward if width > 1) <= 256 for forward in seen if len(forward) > 1)
    assert sum(1 in forward and max(forward) > 1 for forward in seen) >= 2
    assert isinstance(steps, int)


@pytest.mark.parametrize("name", RECURRENT)
def test_without_batching_single_tokens_go_between_the_chunks_of_prompts(name: str) -> None:
    model = tiny_model(name)
    chunk = model.backend.limits.prefill_beside
    assert not model.capabilities.batching
    seen = widths(model)
    long, longer, *short = (TokenSequence(model) for _ in range(5))
    lengths = [2 * chunk + 1, 2 * chunk + 2, 1, 1, 1]
    prefixes = [long, longer, *short]
    model.scheduler.run(
        [
            AppendRequest(torch.arange(length) % 250, prefix.cache)
            for length, prefix in zip(lengths, prefixes, strict=True)
        ]
    )
    rows = [sum(forward) for forward in seen]
    assert rows[:6] == [chunk, 1, 1, 1, chunk, 1]
    assert sum(rows[6:]) == lengths[1]


def test_without_batching_neither_prompts_nor_streams_starve() -> None:
    model = tiny_model("bamba")
    prompt = (torch.arange(1500) % 250).tolist()
    done = threading.Event()

    def decode() -> int:
        prefix, steps = TokenSequence(model), 0
        while not done.is_set():
            prefix.append([1])
            steps += 1
        return steps

    def prefill() -> None:
        try:
            for _ in range(3):
                TokenSequence(model).append(prompt)
        finally:
            done.set()

    *streams, _ = together(decode, decode, decode, prefill)
    assert all(steps > 10 for steps in streams)  # type: ignore[operator]


def test_a_step_that_fails_tells_its_own_caller_alone() -> None:
    model = tiny_model("qwen3")
    outcomes: list[str] = []

    def good(seed: int) -> list[int]:
        return greedy(model, seed, 30)

    def bad() -> None:
        for _ in range(10):
            prefix = TokenSequence(model)
            prefix.append([1, 2])
            with pytest.raises(IndexError):
                prefix.append([10**6])
            assert prefix.cache.get_seq_length() == len(prefix) == 2
            outcomes.append("told")

    alone = [good(seed) for seed in (0, 1)]
    assert together(lambda: good(0), bad, lambda: good(1)) == [alone[0], None, alone[1]]
    assert len(outcomes) == 10


@pytest.mark.parametrize("shared", [0, 1, 4])
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_what_a_shared_forward_wrote_before_it_failed_is_no_part_of_what_follows(name: str, shared: int) -> None:
    model = tiny_model(name)
    prompts = [[5, 6, 7], [65] * 9, [66, 67]]
    sampling = Sampling(max_tokens=12)
    alone = [[step.token_id for step in Engine(model).steps(prompt, sampling)] for prompt in prompts]
    model.prefix_cache.clear()
    seen, failed = widths(model), []

    def fails_once(*args: object) -> None:
        if not failed and sum(len(forward) > 1 for forward in seen) > shared:
            failed.append(len(seen))
            raise RuntimeError("no memory")

    model.model.get_decoder().layers[-1].register_forward_pre_hook(fails_once)
    found = gather([steps_of(Engine(model).generation(prompt, sampling)) for prompt in prompts])
    assert [[step.token_id for step in steps] for steps in found] == alone
    assert [len(forward) for forward in seen[failed[0] - 1 : failed[0] + 3]] == [3, 1, 1, 1]


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
    assert model.scheduler.idle


def test_an_exclusive_turn_steps_at_once_while_others_wait() -> None:
    model = tiny_model("qwen3")
    expected = greedy(model, 1, 15)

    def exclusive() -> None:
        for _ in range(20):
            prefix = TokenSequence(model)
            with model.lock:
                prefix.append([1, 2, 3])
                prefix.append([4])

    assert together(exclusive, lambda: greedy(model, 1, 15))[1] == expected


def selector(model: LanguageModel, seed: int = 0) -> ActivatedSelector:
    torch.manual_seed(seed)
    targets = ["qkv_proj", "o_proj"] if "phi3" in model.name else ["q_proj", "o_proj", "down_proj"]
    made = ActivatedSelector(model, Lora.fresh(model.model, targets=targets, rank=4, alpha=8))
    for layer in made.lora.layers:
        torch.nn.init.normal_(layer.b, std=0.3)
    torch.nn.init.normal_(made.head.weight, std=0.5)
    return made.requires_grad_(False)


def selected(engine: Engine, seed: int, count: int) -> list[Step]:
    prompt = torch.randint(0, 250, (3 + 11 * seed,), generator=torch.Generator().manual_seed(seed)).tolist()
    return list(engine.steps(prompt, Sampling(max_tokens=count)))


def now_and_then(seed: int) -> Trigger:
    """Fires after some prefixes, at other places for every generation."""
    return when(lambda proposal: (len(proposal.prefix) + 2 * seed) % 3 == 0, "now and then")


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "phi3", "gemma3", *RECURRENT])
def test_generations_with_selections_at_once_say_what_each_says_alone(name: str) -> None:
    model = tiny_model(name)
    selectors = [selector(model, 1), selector(model, 2)]  # two adapters on one base
    engines = [Engine(model, trigger=now_and_then(at), selector=selectors[at % 2]) for at in range(6)]
    alone = [selected(engine, at, 15) for at, engine in enumerate(engines)]
    jobs = [lambda at=at, engine=engine: selected(engine, at, 15) for at, engine in enumerate(engines)]
    for got, wanted in zip(together(*jobs), alone, strict=True):
        assert isinstance(got, list)
        assert [step.token_id for step in got] == [step.token_id for step in wanted]
        for ours, theirs in zip(got, wanted, strict=True):
            ours_said, theirs_said = ([c.selector for c in step.candidates] for step in (ours, theirs))
            assert ours_said == pytest.approx(theirs_said, abs=1e-4)
    assert any(step.flipped for steps in alone for step in steps)


def patient(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.5) -> None:
    monkeypatch.setattr("s2t_agents.scheduling.scheduler.BATCH_WAIT", 1e6)
    monkeypatch.setattr("s2t_agents.scheduling.scheduler.BATCH_WAIT_S", seconds)


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_selections_share_forwards_with_each_other_and_with_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patient(monkeypatch)
    model = tiny_model(name)
    seen = widths(model)
    engines = [Engine(model, k=4, trigger=now_and_then(at), selector=selector(model)) for at in range(6)]
    together(*[lambda at=at, engine=engine: selected(engine, at, 20) for at, engine in enumerate(engines)])
    assert len(seen) < 0.6 * 6 * (20 + 6)  # alone: a forward per token, and one per selection
    assert sum(1 in forward and 4 in forward for forward in seen) > 5
    assert any(forward.count(4) > 1 for forward in seen)


def test_a_forward_takes_no_more_candidates_than_it_may_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    patient(monkeypatch)
    model = tiny_model("qwen3")
    model.backend.limits = replace(model.backend.limits, candidates=10)
    seen = widths(model)
    engines = [Engine(model, k=4, trigger=always(), selector=selector(model)) for _ in range(6)]
    together(*[lambda at=at, engine=engine: selected(engine, at, 10) for at, engine in enumerate(engines)])
    assert max(forward.count(4) for forward in seen) == 2


def test_a_look_that_fails_tells_its_own_caller_alone() -> None:
    model = tiny_model("qwen3")
    good = Engine(model, trigger=always(), selector=selector(model))
    alone = [[step.token_id for step in selected(good, seed, 20)] for seed in (0, 1)]
    told = []

    def bad() -> None:
        prefix = read(model, [1, 2])
        for _ in range(10):
            with pytest.raises(IndexError):
                scored_after(prefix, torch.tensor([10**6]))
            told.append(len(prefix))
        prefix.append([3])

    def ids(seed: int) -> list[int]:
        return [step.token_id for step in selected(good, seed, 20)]

    assert together(lambda: ids(0), bad, lambda: ids(1)) == [alone[0], None, alone[1]]
    assert told == [2] * 10
    assert model.scheduler.idle


def test_a_forward_that_is_broken_off_tells_its_caller_and_the_others_go_on() -> None:
    model = tiny_model("qwen3")
    prefix = read(model, [1, 2, 3])
    hit = threading.Event()

    def broken_off(batch: list[Work]) -> None:
        if any(isinstance(item, ScoreCandidates) for item in batch):
            hit.set()
            time.sleep(0.05)
            raise KeyboardInterrupt

    expected = greedy(model, 1, 10)
    watched_forwards(model, broken_off)

    def scoring() -> None:
        with pytest.raises(KeyboardInterrupt):
            scored_after(prefix, torch.tensor([5, 6]))

    def others() -> list[int]:
        assert hit.wait(10)
        return greedy(model, 1, 10)

    assert together(scoring, others)[1] == expected
    assert model.scheduler.idle
    prefix.append([4])
    assert len(prefix) == 4


@pytest.mark.parametrize("name", ["qwen3", *RECURRENT])
def test_what_generations_at_once_are_billed_is_no_more_than_the_forwards_took(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(name)
    engines = [Engine(model, trigger=now_and_then(at), selector=selector(model)) for at in range(5)]
    took: list[float] = []
    monkeypatch.setattr(model.backend, "forward", timed(model.backend.forward, took))
    started = time.monotonic()
    answers = together(*[lambda at=at, engine=engine: selected(engine, at, 12) for at, engine in enumerate(engines)])
    elapsed = time.monotonic() - started
    billed = [sum(step.timings.compute for step in steps) for steps in answers]  # type: ignore[attr-defined]
    assert all(each > 0 for each in billed)
    assert sum(took) <= sum(billed) <= elapsed  # one forward at a time, and none billed twice


def timed(run: Callable[[object], object] | None, took: list[float]) -> Callable[[object], object] | None:
    def measured(parts: object) -> object:
        assert run is not None
        started = time.monotonic()
        try:
            return run(parts)
        finally:
            took.append(time.monotonic() - started)

    return measured if run else None
