"""Long forwards run on one thread with one OpenMP team, the rest of a step alone; the consumer keeps its setting."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from threading import Thread, current_thread, main_thread
from threading import enumerate as enumerate_threads

import forked
import pytest
import torch
from sequences import read
from torch_models import watched_forwards

from s2t_agents.backends import cpu_threads
from s2t_agents.engine.engine import Engine
from s2t_agents.llms.previews import continuations
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.scheduling.sequence import TokenSequence
from s2t_agents.testing import tiny_model
from s2t_agents.triggers import when
from s2t_agents.types import Sampling

TASKS = Path("/proc/self/task")
pytestmark = pytest.mark.skipif(cpu_threads.libgomp() is None, reason="this torch brings no libgomp along")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_only_forwards_have_a_team() -> None:
    model, seen = tiny_model("qwen2"), []
    watched_forwards(model, lambda batch: seen.append(("forward", torch.get_num_threads())))
    trigger = when(lambda proposal: seen.append(("trigger", torch.get_num_threads())) is None)
    engine = Engine(model, trigger=trigger, selector=None)
    engine.selector = Flat()  # type: ignore[assignment]
    seen.extend(("consumer", torch.get_num_threads()) for _ in engine.steps([5, 6, 7], Sampling(max_tokens=3)))
    assert seen[:3] == [("forward", 2), ("trigger", 1), ("consumer", 2)]
    assert set(seen) == {("forward", 2), ("trigger", 1), ("consumer", 2)}


class Flat:
    """Leaves the SLM's order."""

    def scores(self, proposal: object) -> torch.Tensor:
        return proposal.candidate_log_probs  # type: ignore[attr-defined, no-any-return]


def test_previews_have_the_forwards_team_too() -> None:
    model, seen = tiny_model("qwen2"), []
    prefix = read(model, [5, 6, 7])
    watched_forwards(model, lambda batch: seen.append(torch.get_num_threads()))
    with cpu_threads.single_threaded():
        continuations(prefix, [1, 2, 3], 4)
        assert torch.get_num_threads() == 1
    assert set(seen) == {2}


def test_a_step_that_fails_leaves_the_setting_as_it_was() -> None:
    def broken(proposal: object) -> bool:
        raise RuntimeError("no")

    engine = Engine(tiny_model("qwen2"), trigger=when(broken))
    engine.selector = Flat()  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="no"):
        next(engine.steps([5, 6, 7]))
    assert torch.get_num_threads() == 2


def test_a_consumer_that_chose_one_thread_gets_one() -> None:
    model, seen = long_steps(tiny_model("qwen2")), []
    watched_forwards(model, lambda batch: seen.append(torch.get_num_threads()))

    def own() -> None:
        torch.set_num_threads(1)
        ids(model)
        seen.append(torch.get_num_threads())

    thread = Thread(target=own)
    thread.start()
    thread.join()
    assert set(seen) == {1}


@pytest.mark.skipif(not TASKS.exists(), reason="threads are counted in /proc")
def test_a_team_is_given_back() -> None:
    in_a_process_of_its_own("""
        before = threads()
        in_parallel()
        assert threads() == before + 1
        with cpu_threads.single_threaded():
            cpu_threads.release_threads()
            in_parallel()
            assert threads() == before
            with cpu_threads.with_threads(cpu_threads.wanted_threads()):
                in_parallel()
            assert threads() == before + 1
        cpu_threads.release_threads()
        assert threads() == before
    """)


@pytest.mark.skipif(not TASKS.exists(), reason="threads are counted in /proc")
def test_generations_at_once_have_one_team_among_them() -> None:
    in_a_process_of_its_own("""
        from concurrent.futures import ThreadPoolExecutor

        model = tiny_model("qwen2", hidden_size=64)
        long_steps(model)
        engine = Engine(model)
        before = threads()
        with ThreadPoolExecutor(4) as pool:
            prompts = [[5 + n, 6, 7] for n in range(4)]
            answers = [pool.submit(lambda ids=ids: list(engine.steps(ids, Sampling(max_tokens=12)))) for ids in prompts]
            assert all(answer.result() for answer in answers)
            assert threads() <= before + 4 + 2, threads() - before  # theirs, and the forwards' own with its team
    """)


@pytest.mark.skipif(not TASKS.exists(), reason="threads are counted in /proc")
def test_a_callers_own_team_makes_way_and_the_models_goes_when_it_is_idle() -> None:
    in_a_process_of_its_own("""
        model = tiny_model("qwen2", hidden_size=64)
        long_steps(model)
        before = threads()
        in_parallel()
        steps = Engine(model).steps([5, 6, 7], Sampling(max_tokens=4))
        next(steps)
        assert threads() <= before + 2, threads() - before  # the forwards' thread and its team; the caller's has gone
        steps.close()
        assert threads() == before + 1, threads() - before  # its team has gone, too
        time.sleep(3)
        assert threads() == before, threads() - before  # and itself
    """)


@pytest.mark.skipif(not TASKS.exists(), reason="threads are counted in /proc")
def test_a_thread_that_ran_its_own_short_forwards_gives_its_team_back_when_the_answer_ends() -> None:
    in_a_process_of_its_own("""
        from concurrent.futures import ThreadPoolExecutor

        model = tiny_model("qwen2", hidden_size=64)
        with_teams(model)
        in_threads_of_callers(model)
        def answer(n): return len(list(Engine(model).steps([5 + n, 6, 7], Sampling(max_tokens=8))))
        with ThreadPoolExecutor(1) as pool:
            pool.submit(int).result()
            before = threads()
            for n in range(0, 4, 2):
                assert pool.submit(answer, n).result() == answer(n + 1) == 8
            time.sleep(3)  # the scheduler's thread, which ran the first forward of all, ends
            assert threads() == before, threads() - before  # the pool's thread is still there: without a team
    """)


@pytest.mark.skipif(not TASKS.exists(), reason="threads are counted in /proc")
def test_a_caller_that_is_alone_again_finds_no_other_team() -> None:
    in_a_process_of_its_own("""
        model = tiny_model("qwen2", hidden_size=64)
        with_teams(model)
        engine = Engine(model)
        before = threads()
        alone = engine.steps([9, 6, 7], Sampling(max_tokens=100))
        long_steps(model)  # as beside others: the scheduler's thread computes
        next(alone), next(alone)
        assert threads() == before + 2, threads() - before
        in_threads_of_callers(model)
        next(alone)
        assert threads() == before + 2, threads() - before  # its thread, without a team, and the caller's team
        alone.close()
        assert threads() == before + 1, threads() - before
    """)


@pytest.mark.skipif(not TASKS.exists(), reason="threads are counted in /proc")
def test_an_event_loops_own_team_makes_way() -> None:
    in_a_process_of_its_own("""
        import asyncio

        from s2t_agents.chat.async_bridge import ThreadedIterator

        async def answer():
            before = threads()
            in_parallel()  # as embeddings that the loop's thread has computed
            assert threads() == before + 1
            items = ThreadedIterator(each for each in [1, 2])
            assert threads() == before, threads() - before
            assert [item async for item in items] == [1, 2]
        asyncio.run(answer())
    """)


def test_long_forwards_run_in_the_schedulers_thread_and_say_the_same() -> None:
    model, where = tiny_model("qwen2"), []
    watched_forwards(model, lambda batch: where.append(current_thread().name))
    short = replace(model.backend.limits, hand_over_s=60.0)
    model.backend.limits = short
    here = ids(model)
    assert where[0] == "s2t-scheduler"  # nothing is known of the model yet
    assert where[2:] == ["MainThread"] * 6
    model.prefix_cache.clear()
    where.clear()
    assert ids(long_steps(model)) == here
    assert set(where) == {"s2t-scheduler"}


def test_an_interrupted_caller_leaves_when_the_forward_is_done() -> None:
    model, done = long_steps(tiny_model("qwen2")), []
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)  # SIGINT may be ignored where tests run

    def watch(batch: object) -> None:
        signal.pthread_kill(main_thread().ident or 0, signal.SIGUSR1)
        time.sleep(0.2)
        done.append(True)

    watched_forwards(model, watch)
    prefix = TokenSequence(model)
    try:
        with pytest.raises(KeyboardInterrupt):
            prefix.append([5, 6, 7])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert done == [True]
    assert not len(prefix)


def test_the_thread_ends_with_its_model() -> None:
    others = set(enumerate_threads())
    model = long_steps(tiny_model("qwen2", seed=7))
    ids(model)
    (thread,) = [each for each in enumerate_threads() if each not in others]
    assert thread.is_alive()
    del model
    gc.collect()
    thread.join(timeout=10)
    assert not thread.is_alive()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_has_a_thread_of_its_own() -> None:
    in_a_process_of_its_own("""
        import signal
        import threading
        model = tiny_model("qwen2")
        long_steps(model)
        def ids(): return [step.token_id for step in Engine(model).steps([5, 6, 7], Sampling(max_tokens=8))]
        before = ids()
        assert [thread for thread in threading.enumerate() if thread.name == 's2t-scheduler']
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # in vain it would wait for ever
            os._exit(0 if ids() == before else 1)
        assert os.waitpid(child, 0)[1] == 0
    """)


def long_steps(model: LanguageModel) -> LanguageModel:
    """Every step counts as long: it is handed to the scheduler's thread."""
    model.backend.limits = replace(model.backend.limits, hand_over_s=-1.0)
    return model


def ids(model: LanguageModel) -> list[int]:
    return [step.token_id for step in Engine(model).steps([5, 6, 7], Sampling(max_tokens=8))]


def in_a_process_of_its_own(body: str) -> None:
    """Where nobody else begins or ends a thread."""
    head = """
        import os
        import time
        import torch
        from s2t_agents.backends import cpu_threads
        from s2t_agents.engine.engine import Engine
        from s2t_agents.testing import tiny_model
        from s2t_agents.types import Sampling
        torch.set_num_threads(2)
        cpu_threads.release_threads()
        def threads():  # once those that are ending have ended
            time.sleep(0.3)
            return len(os.listdir("/proc/self/task"))
        def in_parallel(): torch.zeros(400_000).add_(1)
        def long_steps(model):
            from dataclasses import replace
            model.backend.limits = replace(model.backend.limits, hand_over_s=-1.0)
        def in_threads_of_callers(model):
            from dataclasses import replace
            model.backend.limits = replace(model.backend.limits, hand_over_s=60.0)
        def with_teams(model):  # a tiny model's own operations are too small for one
            own = model.backend.forward
            model.backend.forward = lambda batch: (in_parallel(), own(batch))[1]
    """
    code = dedent(head) + dedent(body)
    done = forked.run("-c", code)
    assert not done.returncode, done.stderr[-2000:]


def test_without_such_a_runtime_everything_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with_it = ids(tiny_model("qwen2"))
    monkeypatch.setattr(cpu_threads, "libgomp", lambda: None)
    assert ids(tiny_model("qwen2")) == with_it
    assert torch.get_num_threads() == 2
