"""A generation's deadline ends it in the queue, between the chunks of its prompt, and after a step."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from typing import Any

import pytest
from torch_models import slot_taken, watched_forwards

from s2t_agents import Budget, ChatS2T, Concurrency, Engine, Ledger
from s2t_agents.backends.base import Work
from s2t_agents.engine.engine import steps_of
from s2t_agents.errors import BudgetExceeded, Overloaded
from s2t_agents.scheduling.admission import AdmissionQueue
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.scheduling.sequence import TokenSequence
from s2t_agents.scheduling.waits import Waiting, gather
from s2t_agents.testing import RECURRENT, tiny_model
from s2t_agents.types import Sampling, Step

CHUNK = 16
PROMPT = [10 + 7 * at % 200 for at in range(100)]
SAMPLING = Sampling(max_tokens=6)


class Over(Exception):
    pass


class AfterForwards:
    """A deadline that seems to pass after so many forwards.

    Args:
        forwards: after how many; 0 is before the first.
        moves: it has moved by then, and there is time after all.
    """

    def __init__(self, forwards: int, *, moves: bool = False) -> None:
        self.left, self.moves, self.checked = forwards, moves, 0

    def left_s(self) -> float:
        return 0.0 if self.left <= 0 else 1.0

    def end_s(self) -> float:
        return math.inf

    def check(self) -> None:
        self.checked += 1
        if not self.moves:
            raise Over
        self.left = 10**6


def chunked(name: str = "qwen3") -> tuple[LanguageModel, list[int]]:
    """A model that reads prompts in small chunks, and the rows of each of its forwards."""
    model, forwards = tiny_model(name), list[int]()
    model.backend.limits = replace(model.backend.limits, prefill_alone=CHUNK, prefill_beside=CHUNK)
    watched_forwards(model, lambda batch: forwards.append(sum(len(work.ids) for work in batch)))
    return model, forwards


def counted(model: LanguageModel, deadline: AfterForwards) -> None:
    def count(batch: list[Work]) -> None:
        deadline.left -= 1

    watched_forwards(model, count)


def tokens(steps: list[Step]) -> list[int]:
    return [step.token_id for step in steps]


@pytest.mark.parametrize("name", ["qwen3", "gemma3", *RECURRENT])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_prompt_stops_between_two_chunks_and_leaves_nothing(name: str, after: int) -> None:
    model, forwards = chunked(name)
    expected = tokens(list(Engine(model).steps(PROMPT, SAMPLING)))
    model.prefix_cache.clear()
    forwards.clear()
    deadline = AfterForwards(after)
    counted(model, deadline)
    engine = Engine(model)
    with pytest.raises(Over):
        next(engine.steps(PROMPT, SAMPLING, deadline=deadline))
    assert len(forwards) == after
    assert (engine.admission.running, len(model.running), model.scheduler.idle) == (0, 0, True)
    assert tokens(list(engine.steps(PROMPT, SAMPLING))) == expected


@pytest.mark.parametrize("name", ["qwen3", *RECURRENT])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_deadline_that_has_moved_lets_the_prompt_go_on_where_it_was(name: str, after: int) -> None:
    model, forwards = chunked(name)
    expected = tokens(list(Engine(model).steps(PROMPT, SAMPLING)))
    model.prefix_cache.clear()
    wanted = len(forwards)
    forwards.clear()
    deadline = AfterForwards(after, moves=True)
    counted(model, deadline)
    assert tokens(list(Engine(model).steps(PROMPT, SAMPLING, deadline=deadline))) == expected
    assert (deadline.checked, len(forwards)) == (1, wanted)


def test_others_go_on_when_one_prompt_is_given_up() -> None:
    model, _ = chunked()
    others = [[5 + at, *PROMPT[:60]] for at in range(3)]
    expected = [tokens(list(Engine(model).steps(prompt, SAMPLING))) for prompt in others]
    model.prefix_cache.clear()
    deadline = AfterForwards(2)
    counted(model, deadline)
    engine = Engine(model)

    def given_up() -> Waiting[list[Step]]:
        try:
            return (yield from steps_of(engine.generation(PROMPT, SAMPLING, deadline=deadline)))
        except Over:
            return []

    found = gather([given_up(), *(steps_of(engine.generation(prompt, SAMPLING)) for prompt in others)])
    assert [tokens(steps) for steps in found] == [[], *expected]


def test_who_waits_for_a_prompt_that_another_reads_is_given_up_too() -> None:
    model, _ = chunked()
    engine, deadline = Engine(model), AfterForwards(0)
    reading = engine.generation(PROMPT, SAMPLING)
    next(reading)  # its first chunk is asked for
    waiting = engine.generation([*PROMPT[:-1], 3], SAMPLING, deadline=deadline)
    wait: Any = next(waiting)
    assert wait.over
    with pytest.raises(Over):
        next(waiting)
    reading.close()


def test_a_sequence_that_was_given_up_holds_what_it_held() -> None:
    model, _ = chunked()
    deadline = AfterForwards(10)
    counted(model, deadline)
    sequence = TokenSequence(model, deadline=deadline)
    sequence.append(PROMPT[:20])
    deadline.left = 1
    with pytest.raises(Over):
        sequence.append(PROMPT[20:])
    assert (len(sequence), sequence.cache.length) == (20, 20)
    deadline.left = 10**6
    sequence.append(PROMPT[20:])
    other = TokenSequence(model)
    other.append(PROMPT)
    assert int(sequence.logits.argmax()) == int(other.logits.argmax())


# ------------------------------------------------------------------ in the queue


def test_a_ticket_ends_at_the_deadline_or_at_its_own_patience_whichever_is_first() -> None:
    class Moving(AfterForwards):
        def left_s(self) -> float:
            return 0.01 if self.checked else 0.0

    endless, short = (AdmissionQueue(Concurrency(running=1, wait_s=wait_s)) for wait_s in (math.inf, 0.0))
    with endless.enter(), endless.enter(AfterForwards(0)) as ticket, pytest.raises(Over):
        ticket.wait()
    with short.enter(), short.enter(Moving(0, moves=True)) as ticket, pytest.raises(Overloaded):
        ticket.wait()
    assert endless.queued == short.queued == 0


@pytest.mark.parametrize("mode", ["degrade", "raise"])
@pytest.mark.parametrize("how", ["invoke", "stream", "ainvoke"])
def test_a_budgets_seconds_end_an_answer_in_the_queue(how: str, mode: Any) -> None:
    model = ChatS2T(
        model=tiny_model(),
        max_tokens=12,
        concurrency=Concurrency(running=1, wait_s=math.inf),
        ledger=(ledger := Ledger()),
    )
    budget = Budget(seconds=0.3, answers=5, on_exhausted=mode, name="short")

    def asked() -> Any:
        if how == "ainvoke":
            return asyncio.run(model.ainvoke("hello", s2t_budget=budget))
        if how == "stream":
            *_, last = model.stream("hello", s2t_budget=budget)
            return last
        return model.invoke("hello", s2t_budget=budget)

    with slot_taken(model):
        if mode == "raise":
            with pytest.raises(BudgetExceeded, match=r"'short': its 0.3 seconds are over"):
                asked()
        else:
            s2t = asked().response_metadata["s2t"]
            assert s2t["tokens"] == 0
            assert s2t["stopped_by"] == {"budget": "short", "unit": "seconds", "limit": 0.3}
    record = next(record for record in ledger.records() if record.completion_tokens == 0)
    assert record.stopped_by is not None or record.error
    assert (budget.state().spent["answers"], budget.state().holds) == (0, 0)
