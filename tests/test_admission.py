"""Admission: never more generations at once than the limit, first come first served, an error instead of a hang."""

from __future__ import annotations

import inspect
import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest

from s2t_agents import ChatS2T, Engine, cli
from s2t_agents.errors import ConfigError, Overloaded
from s2t_agents.scheduling import admission
from s2t_agents.scheduling.admission import AdmissionQueue, AdmissionTicket, Concurrency
from s2t_agents.testing import tiny_model
from s2t_agents.types import Sampling, Step


@contextmanager
def admitted(queue: AdmissionQueue) -> Iterator[float]:
    with queue.enter() as ticket:
        yield ticket.wait()


def test_the_server_admits_as_many_as_an_engine_by_default() -> None:
    given = inspect.signature(cli.serve).parameters
    assert Concurrency(given["running"].default, given["waiting"].default) == Concurrency()


def test_never_more_run_than_the_limit_and_all_get_their_turn() -> None:
    queue, lock = AdmissionQueue(Concurrency(running=3)), threading.Lock()
    inside, most, served = 0, 0, 0

    def work() -> None:
        nonlocal inside, most, served
        with admitted(queue):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.002)
            with lock:
                inside -= 1
                served += 1

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda _: work(), range(60)))
    assert (most, served, inside) == (3, 60, 0)


def test_first_come_first_served() -> None:
    queue, order = AdmissionQueue(Concurrency(running=1)), []

    def work(name: int) -> None:
        with admitted(queue):
            order.append(name)

    with admitted(queue):
        threads = []
        for name in range(6):
            threads.append(threading.Thread(target=work, args=(name,)))
            threads[-1].start()
            while queue.queued <= name:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == list(range(6))


def test_a_full_queue_says_so_at_once_and_a_long_wait_at_its_end() -> None:
    full = AdmissionQueue(Concurrency(running=1, waiting=0))
    with admitted(full), pytest.raises(Overloaded, match="1 generations run and 0 wait"), admitted(full):
        pass
    slow = AdmissionQueue(Concurrency(running=1, wait_s=0.05))
    with admitted(slow), pytest.raises(Overloaded, match=r"within 0\.05 seconds"), admitted(slow):
        pass
    with admitted(slow):  # and the slot is free again
        pass
    assert Overloaded.retryable


def test_a_ticket_shows_its_admission_without_waiting_for_it() -> None:
    queue = AdmissionQueue(Concurrency(running=1))
    with queue.enter() as first, queue.enter() as second:
        assert (first.admitted.done(), second.admitted.done()) == (True, False)
        with queue.enter() as third:
            pass  # who leaves the queue leaves no gap
        assert not third.admitted.cancel()  # only the queue ends a wait
    with queue.enter() as fourth:
        assert fourth.admitted.done()


def test_a_lost_stream_may_be_collected_while_the_queue_is_changing() -> None:
    queue, first, lost = AdmissionQueue(Concurrency(running=2)), ExitStack(), ExitStack()
    first.enter_context(queue.enter())
    lost.enter_context(queue.enter())
    with queue.enter() as ticket:
        ticket.admitted.add_done_callback(lambda _: lost.close())  # stands for the collector
        leaving = threading.Thread(target=first.close, daemon=True)
        leaving.start()
        leaving.join(10)
        assert not leaving.is_alive()
        assert queue.running == 1


def test_the_wait_may_be_endless() -> None:
    queue, holder = AdmissionQueue(Concurrency(running=1, wait_s=math.inf)), ExitStack()
    holder.enter_context(queue.enter())
    threading.Timer(0.05, holder.close).start()
    with queue.enter() as ticket:
        assert ticket.wait() > 0


@pytest.mark.parametrize("wrong", [{"running": 0}, {"waiting": -1}, {"wait_s": -1.0}, {"wait_s": float("nan")}])
def test_limits_that_admit_no_generation_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Concurrency(**wrong)  # type: ignore[arg-type]


def test_streams_that_nobody_reads_end_in_an_error_not_in_a_deadlock() -> None:
    engine = Engine(tiny_model("qwen3"), concurrency=Concurrency(running=2, wait_s=0.05))
    streams = [engine.steps([1, 2, 3], Sampling(max_tokens=9)) for _ in range(3)]
    next(streams[0])
    next(streams[1])
    with pytest.raises(Overloaded):
        next(streams[2])
    streams[0].close()
    assert len(list(engine.steps([1, 2, 3], Sampling(max_tokens=4)))) == 4


def test_the_first_step_tells_how_long_its_generation_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_model("qwen3"), concurrency=Concurrency(running=1))
    holder = engine.steps([1, 2, 3], Sampling(max_tokens=9))
    next(holder)
    now = [5.0]
    monkeypatch.setattr(admission, "time", SimpleNamespace(monotonic=lambda: now[0]))
    queued = engine.run([1, 2, 3], Sampling(max_tokens=3))
    assert isinstance(next(queued), AdmissionTicket)
    now[0] += 2.5
    holder.close()
    steps = list(queued)
    assert steps[0].timings.queue == 2.5
    assert [step.timings.queue for step in steps[1:]] == [0.0, 0.0]


def test_a_run_shows_its_ticket_only_if_it_has_to_wait_and_steps_never_do() -> None:
    engine = Engine(tiny_model("qwen3"), concurrency=Concurrency(running=1))
    holder = engine.run([1, 2, 3], Sampling(max_tokens=9))
    assert isinstance(next(holder), Step)
    behind = engine.run([1, 2, 3], Sampling(max_tokens=2))
    assert isinstance(ticket := next(behind), AdmissionTicket)
    assert not ticket.admitted.done()
    holder.close()
    assert ticket.admitted.done()
    assert all(isinstance(step, Step) for step in behind)
    holder = engine.run([1, 2, 3], Sampling(max_tokens=9))
    next(holder)
    threading.Timer(0.1, holder.close).start()
    assert all(isinstance(step, Step) for step in engine.steps([1, 2, 3], Sampling(max_tokens=2)))


def test_a_chat_model_takes_the_limits_and_reports_the_wait() -> None:
    model = ChatS2T(concurrency=Concurrency(running=1, waiting=0))
    stream = model.stream("hi")
    next(stream)
    with pytest.raises(Overloaded):
        model.invoke("hi")
    stream.close()
    assert model.invoke("hi").response_metadata["s2t"]["latency_ms"]["queue"] >= 0
