"""Generations that go on at the same time read what they have in common once, and say what each says alone."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event, Thread
from time import sleep

import pytest
import torch
from sequences import appended
from torch_models import watched_forwards

from s2t_agents.backends.base import Work
from s2t_agents.engine.engine import Engine
from s2t_agents.scheduling import running_prefixes
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.scheduling.prefix_cache import PrefixCache
from s2t_agents.scheduling.running_prefixes import RunningPrefixes
from s2t_agents.scheduling.sequence import TokenSequence
from s2t_agents.scheduling.waits import finish
from s2t_agents.testing import ARCHITECTURES, RECURRENT, tiny_model
from s2t_agents.types import Sampling

SYSTEM = torch.randint(0, 250, (60,), generator=torch.Generator().manual_seed(2)).tolist()
PROMPTS = [[*SYSTEM, *range(10 * n, 10 * n + 9)] for n in range(1, 7)]


@pytest.fixture
def model() -> Iterator[LanguageModel]:
    model = tiny_model("qwen3")
    model.prefix_cache.clear()
    yield model
    assert not len(model.running)


def answer(model: LanguageModel, prompt: list[int], scope: str | None = None) -> tuple[list[int], int]:
    """Tokens, and how many of the prompt's were not read again."""
    steps = list(Engine(model).steps(prompt, Sampling(max_tokens=12), cache_scope=scope))
    return [step.token_id for step in steps], steps[0].reused_tokens


def alone(model: LanguageModel, prompt: list[int]) -> list[int]:
    model.prefix_cache.clear()
    return answer(model, prompt)[0]


def at_once(model: LanguageModel, prompts: list[list[int]], scopes: list[str | None]) -> list[tuple[list[int], int]]:
    """Answers that begin together, with nothing of the past."""
    model.prefix_cache.clear()
    together = Barrier(len(prompts))

    def one(prompt: list[int], scope: str | None) -> tuple[list[int], int]:
        together.wait()
        return answer(model, prompt, scope)

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(one, prompts, scopes))


@pytest.mark.parametrize("name", [*ARCHITECTURES, *RECURRENT])
def test_agents_that_start_together_read_their_system_prompt_once(name: str) -> None:
    model = tiny_model(name)
    expected = [alone(model, prompt) for prompt in PROMPTS]
    found = at_once(model, PROMPTS, [None] * len(PROMPTS))
    assert [ids for ids, _ in found] == expected
    reused = sorted(reused for _, reused in found)
    shared = len(SYSTEM) if model.capabilities.truncation else 0  # recurrent states cannot be cut
    assert reused == [0, *[shared] * (len(PROMPTS) - 1)]


def test_who_comes_while_an_answer_goes_on_needs_not_wait_for_its_end(model: LanguageModel) -> None:
    expected = alone(model, PROMPTS[1])
    model.prefix_cache.clear()
    first = Engine(model).steps(PROMPTS[0], Sampling(max_tokens=12))
    next(first)
    assert answer(model, PROMPTS[1]) == (expected, len(SYSTEM))
    first.close()


def test_scopes_neither_share_nor_wait(model: LanguageModel) -> None:
    found = at_once(model, PROMPTS[:4], ["a", "a", "b", None])
    assert sorted(reused for _, reused in found) == [0, 0, 0, len(SYSTEM)]


def test_the_longest_is_taken_whether_past_or_present(model: LanguageModel) -> None:
    answer(model, PROMPTS[0])
    longer = [*PROMPTS[0], 1, 2, 3]
    steps = Engine(model).steps([*SYSTEM, 200, 201], Sampling(max_tokens=4))
    next(steps)
    assert answer(model, longer)[1] == len(PROMPTS[0])  # the past holds more of it than the one going on
    steps.close()


def test_a_reader_that_fails_holds_nobody_up(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone(model, PROMPTS[1])
    model.prefix_cache.clear()
    reading, waited = Event(), Event()

    def failing(batch: list[Work]) -> None:
        if int(batch[0].ids[-1]) == PROMPTS[0][-1]:
            reading.set()
            waited.wait(5)
            raise RuntimeError("no memory")

    watched_forwards(model, failing)
    errors: list[BaseException] = []

    def first() -> None:
        try:
            answer(model, PROMPTS[0])
        except RuntimeError as error:
            errors.append(error)

    reader = Thread(target=first)
    reader.start()
    reading.wait(5)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(answer, model, PROMPTS[1])
        with pytest.raises(TimeoutError):
            second.result(timeout=0.1)  # it waits for the part that is being read
        waited.set()
        assert second.result(timeout=30) == (expected, 0)
    reader.join()
    assert len(errors) == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), KeyboardInterrupt()], ids=repr)
def test_a_past_that_cannot_be_forked_leaves_no_reader_behind(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    expected = alone(model, PROMPTS[1])
    model.prefix_cache.clear()
    answer(model, PROMPTS[0])
    [past] = model.prefix_cache.entries

    def failing(length: int) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(past.cache, "fork", failing)
        with pytest.raises(type(error)):
            answer(model, PROMPTS[1])
    assert len(model.running) == 0
    assert answer(model, PROMPTS[1]) == (expected, len(SYSTEM))


def test_who_waits_leaves_the_readers_time_to_the_reader(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are compared once on the way in and once when the shared part is there, not over and over."""
    compared: list[int] = []
    common = running_prefixes.common_prefix
    monkeypatch.setattr(running_prefixes, "common_prefix", lambda *both: compared.append(1) or common(*both))
    live = model.running
    first, _, _ = finish(live.enter([*SYSTEM, 7], None))
    first.cache = model.new_cache()
    with ThreadPoolExecutor(1) as pool, first:
        second = pool.submit(finish, live.enter([*SYSTEM, 8], None))
        sleep(0.5)
        appended(model, torch.tensor(SYSTEM), first.cache)  # type: ignore[arg-type]
        entry, _, length = second.result(timeout=10)
    assert length == len(SYSTEM)
    assert len(compared) <= 4
    live.leave(first)
    live.leave(entry)


def test_a_consumer_that_pauses_before_its_prompt_is_read_holds_nobody_up(model: LanguageModel) -> None:
    """As one whose grammar forces the first tokens: they come before any forward."""
    expected = alone(model, PROMPTS[1])
    model.prefix_cache.clear()
    with finish(TokenSequence.from_prefix_cache(model, PROMPTS[0])), ThreadPoolExecutor(1) as pool:
        assert pool.submit(answer, model, PROMPTS[1]).result(timeout=20) == (expected, 0)


def test_a_limit_of_nothing_and_kv_that_moves_share_nothing() -> None:
    for live in (RunningPrefixes(PrefixCache(0), shares=True), RunningPrefixes(PrefixCache(), shares=False)):
        first, _, _ = finish(live.enter(SYSTEM, None))
        second, cache, length = finish(live.enter(SYSTEM, None))  # at once, though nothing of the first is read
        assert (cache, length) == (None, 0)
        live.leave(first)
        live.leave(second)
        assert not len(live)


def test_a_copy_is_the_takers_own(model: LanguageModel) -> None:
    steps = Engine(model).steps(PROMPTS[0], Sampling(max_tokens=12))
    in_flight = [next(steps).token_id]
    answer(model, PROMPTS[1])
    in_flight += [step.token_id for step in steps]
    assert in_flight == alone(model, PROMPTS[0])
