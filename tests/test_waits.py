"""Many generations in one thread answer as each does alone, and wait for each other only where they must."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from sequences import read
from test_selectors import activated, adapted, head, published
from torch_models import watched_forwards

from s2t_agents.backends.base import Work
from s2t_agents.budget import Budget
from s2t_agents.engine.engine import Engine, steps_of
from s2t_agents.errors import ContextOverflow, Overloaded
from s2t_agents.escalation import Escalation
from s2t_agents.llms import LocalLLM
from s2t_agents.scheduling.admission import Concurrency
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.scheduling.sequence import TokenSequence
from s2t_agents.scheduling.waits import Wait, Waiting, finish, gather
from s2t_agents.testing import ScriptedLLM, last_candidate, tiny_model
from s2t_agents.triggers import always, entropy
from s2t_agents.types import Sampling, Step

SYSTEM = list(range(30, 60))
PROMPTS = [[5, 6, 7], [*SYSTEM, 1, 2], [65] * 9, [*SYSTEM, 3], [*SYSTEM, 1, 2], [66, 67]]
SAMPLING = Sampling(max_tokens=12)


def tokens(steps: Sequence[Step]) -> list[int]:
    return [step.token_id for step in steps]


def alone(engine: Engine, **settings: Any) -> list[list[int]]:
    return [
        tokens(list(engine.steps(prompt, SAMPLING, cache_scope=f"{at}", **settings)))
        for at, prompt in enumerate(PROMPTS)
    ]


def at_once(engine: Engine, **settings: Any) -> list[list[int]]:
    found = gather([steps_of(engine.generation(prompt, SAMPLING, **settings)) for prompt in PROMPTS])
    return [tokens(steps) for steps in found]


def watched(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[list[Work]]:
    """The batches of all forwards from now on."""
    batches: list[list[Work]] = []
    real = model.backend.forward
    monkeypatch.setattr(model.backend, "forward", lambda batch: (batches.append(list(batch)), real(batch))[1])
    return batches


@pytest.mark.parametrize("kind", [None, activated, adapted, head, published])
def test_answers_are_those_of_each_alone(kind: Any) -> None:
    model = tiny_model()
    selector = kind(model, trained=True) if kind else None
    engine = Engine(model, trigger=entropy(above=2.0), selector=selector)
    assert at_once(engine) == alone(engine)


def test_an_llm_on_this_machine_is_asked_as_for_each_alone() -> None:
    model, large = tiny_model(), tiny_model(seed=5)
    engine = Engine(model, trigger=entropy(above=2.0), escalation=Escalation(LocalLLM(large), margin=1.0))
    own = [Budget(escalations=3) for _ in PROMPTS]
    found = gather(
        [
            steps_of(engine.generation(prompt, SAMPLING, budget=budget))
            for prompt, budget in zip(PROMPTS, own, strict=True)
        ]
    )
    singly = [
        list(engine.steps(prompt, SAMPLING, cache_scope="alone", budget=Budget(escalations=3))) for prompt in PROMPTS
    ]
    assert [tokens(steps) for steps in found] == [tokens(steps) for steps in singly]
    assert [[step.picked_by for step in steps] for steps in found] == [
        [step.picked_by for step in steps] for steps in singly
    ]


def test_all_go_through_the_model_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    batches = watched(model, monkeypatch)
    at_once(Engine(model))
    assert sum(len(batch) == len(PROMPTS) for batch in batches) >= SAMPLING.max_tokens - 1
    assert len(batches) <= SAMPLING.max_tokens + 4  # the shared system prompt is read first


def test_adapted_prefixes_are_read_beside_each_other_and_beside_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    selector = adapted(model, trained=True)
    batches = watched(model, monkeypatch)
    at_once(Engine(model, trigger=always(), selector=selector))
    both = [{getattr(work, "lora", None) for work in batch} for batch in batches]
    assert {None, selector.lora} in both
    assert any(sum(work.lora is selector.lora for work in batch) > 1 for batch in batches)
    assert max(len(work.ids) for batch in batches[8:] for work in batch) == 1  # each goes on from its own KV


def test_a_shared_beginning_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    batches = watched(model, monkeypatch)
    at_once(Engine(model))
    read = sum(len(work.ids) for batch in batches for work in batch if len(work.ids) > 1)
    assert read <= sum(len(prompt) for prompt in PROMPTS) - 2 * len(SYSTEM)


def test_more_than_may_run_take_turns() -> None:
    model = tiny_model()
    narrow = Engine(model, concurrency=Concurrency(running=2, waiting=9))
    assert at_once(narrow) == alone(Engine(model))


def test_what_one_raises_closes_the_others() -> None:
    model, llm = tiny_model(), ScriptedLLM(last_candidate)
    engine = Engine(model, trigger=always(), escalation=Escalation(llm, margin=1.0))

    def failing() -> Waiting[list[Step]]:
        yield from steps_of(engine.generation([1, 2], Sampling(max_tokens=3)))
        return list(engine.steps([1] * 10_000))

    with pytest.raises(ContextOverflow):
        gather([steps_of(engine.generation([1, 2, 3], Sampling(max_tokens=50))), failing()])
    assert (llm.opened, llm.closed) == (2, 2)
    assert model.scheduler.idle
    assert len(model.running) == 0


@pytest.mark.parametrize("hand_over_s", [-1.0, 60.0], ids=["scheduler's thread", "this thread"])
@pytest.mark.parametrize("length", [0, 5])  # its prompt, or a token later on
def test_a_forward_that_fails_is_its_own_generations_error(
    monkeypatch: pytest.MonkeyPatch, length: int, hand_over_s: float
) -> None:
    model = tiny_model()
    model.backend.limits = replace(model.backend.limits, hand_over_s=hand_over_s)
    real = model.backend.forward

    doomed: list[Any] = []

    def failing(batch: Sequence[Work]) -> Any:
        doomed.extend(work.cache for work in batch if 99 in work.ids.tolist())
        if any(work.cache in doomed and work.length >= length for work in batch):
            raise RuntimeError("no memory")
        return real(batch)

    def told(prompt: list[int]) -> Waiting[object]:
        try:
            return tokens((yield from steps_of(Engine(model).generation(prompt, SAMPLING, cache_scope="b"))))
        except RuntimeError as error:
            return str(error)

    [expected] = gather([told([5, 6, 7])])
    monkeypatch.setattr(model.backend, "forward", failing)
    assert gather([told([5, 6, 7]), told([98, 99])]) == [expected, "no memory"]


def test_an_interrupt_of_a_shared_forward_ends_all_of_them() -> None:
    model = tiny_model()
    model.backend.limits = replace(model.backend.limits, hand_over_s=60.0)  # forwards in this thread, once timed
    engine = Engine(model)
    expected = alone(engine)
    shared: list[int] = []

    def interrupted(batch: list[Work]) -> None:
        shared.extend([len(batch)] if len(batch) > 1 else [])
        if len(shared) == 3:
            shared.append(0)
            raise KeyboardInterrupt

    watched_forwards(model, interrupted)
    with pytest.raises(KeyboardInterrupt):
        at_once(engine)
    assert model.scheduler.idle
    assert len(model.running) == 0
    assert at_once(engine) == expected


def test_one_computation_may_run_several_generations_after_another() -> None:
    model = tiny_model()
    engine = Engine(model)

    def dialogue(prompt: list[int]) -> Waiting[list[int]]:
        first = tokens((yield from steps_of(engine.generation(prompt, SAMPLING))))
        return tokens((yield from steps_of(engine.generation([*prompt, *first, 7], SAMPLING))))

    def singly(prompt: list[int]) -> list[int]:
        first = tokens(list(engine.steps(prompt, SAMPLING, cache_scope="alone")))
        return tokens(list(engine.steps([*prompt, *first, 7], SAMPLING, cache_scope="alone")))

    prompts = [*PROMPTS[:3], [1]]
    assert gather([dialogue(prompt) for prompt in prompts]) == [singly(prompt) for prompt in prompts]


class Failing(Wait):
    """A wait that cannot be brought about."""

    over = False

    def __init__(self, error: BaseException, *, lasting: bool = False) -> None:
        self._error, self.lasting = error, lasting

    def block(self) -> None:
        raise self._error


def singly(computations: Sequence[Waiting[Any]]) -> list[Any]:
    return [finish(each) for each in computations]


@pytest.mark.parametrize("driver", [singly, gather])
@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("gone"), Overloaded("no slot"), KeyboardInterrupt()], ids=repr)
def test_a_wait_that_fails_is_raised_in_its_own_computation(driver: Any, lasting: bool, error: BaseException) -> None:
    engine = Engine(tiny_model())
    expected = tokens(list(engine.steps(PROMPTS[0], SAMPLING)))

    def told(times: int) -> Waiting[list[BaseException]]:
        found = []
        for _ in range(times):
            try:
                yield Failing(error, lasting=lasting)
            except BaseException as seen:  # noqa: BLE001 - an interrupt is among them
                found.append(seen)
        return found

    def answer() -> Waiting[list[int]]:
        return tokens((yield from steps_of(engine.generation(PROMPTS[0], SAMPLING, cache_scope="other"))))

    assert driver([told(1), answer(), told(3)]) == [[error], expected, [error] * 3]


@pytest.mark.parametrize("driver", [singly, gather])
def test_a_slot_that_does_not_become_free_is_each_generations_own_error(driver: Any) -> None:
    engine = Engine(tiny_model(), concurrency=Concurrency(running=1, waiting=9, wait_s=0.05))

    def told(prompt: list[int]) -> Waiting[object]:
        try:
            return tokens((yield from steps_of(engine.generation(prompt, SAMPLING))))
        except Overloaded as error:
            return type(error)

    with engine.admission.enter() as ticket:
        ticket.wait()
        assert driver([told(prompt) for prompt in PROMPTS[:3]]) == [Overloaded] * 3
    assert driver([told(PROMPTS[0])]) == [tokens(list(engine.steps(PROMPTS[0], SAMPLING, cache_scope="other")))]


def test_a_failed_wait_that_nobody_answers_ends_all_with_its_error() -> None:
    closed = []

    def failing() -> Waiting[None]:
        try:
            yield Failing(RuntimeError("gone"))
        finally:
            closed.append("own")

    def other() -> Waiting[None]:
        try:
            while True:
                yield Failing(RuntimeError("not looked at"))
        except GeneratorExit:
            closed.append("other")
            raise

    with pytest.raises(RuntimeError, match="gone"):
        gather([failing(), other()])
    assert closed == ["own", "other"]


def test_a_generation_may_end_where_its_wait_fails() -> None:
    def generation() -> Generator[Wait | Step, None, None]:
        with suppress(RuntimeError):
            yield Failing(RuntimeError("gone"))

    assert gather([steps_of(generation())]) == [[]]


def test_what_several_append_to_forks_goes_through_the_model_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    prefixes = [read(model, prompt) for prompt in PROMPTS[:3]]

    def forked(prefix: TokenSequence) -> Waiting[list[list[int]]]:
        found: list[list[int]] = [[7], [8]]
        with prefix.forks(2) as forks:
            for _ in range(3):
                rows = yield from forks.appending([each[-1] for each in found])
                for each, logits in zip(found, rows, strict=True):
                    assert logits is not None
                    each.append(int(logits.argmax()))
        return found

    expected = [finish(forked(prefix)) for prefix in prefixes]
    batches = watched(model, monkeypatch)
    assert gather([forked(prefix) for prefix in prefixes]) == expected
    assert [len(batch) for batch in batches] == [6, 6, 6]


def test_nothing_to_run_is_nothing_found() -> None:
    assert gather([]) == []
