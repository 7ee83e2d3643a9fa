"""A judge that is late, busy or refuses: whose fault it was decides whether others may still ask it."""

import threading
from collections.abc import Iterator

import httpx
import pytest
import torch
from test_judge import PROMPT, answer, first_shown, judge, prefix_of, raises

from s2t_agents import Budget
from s2t_agents.errors import ContextOverflow, EndpointBusy, EndpointRefused, ModelNotFound, OutOfTime, QuestionRefused
from s2t_agents.selectors import CircuitBreaker, Question
from s2t_agents.selectors import judge as module
from s2t_agents.testing import tiny_model
from s2t_agents.triggers import always


class Hours:
    """A clock that stands still until it is moved."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Declined(Exception):
    """As the clients of OpenAI and Anthropic raise it."""

    def __init__(self, status_code: int, **headers: str) -> None:
        super().__init__("declined")
        self.status_code = status_code
        self.response = httpx.Response(status_code, headers={key.replace("_", "-"): headers[key] for key in headers})


@pytest.fixture
def release() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def question(seconds: float | None = None) -> Question:
    return Question(PROMPT, [65, 66, 67], prefix=prefix_of(tiny_model()), seconds=seconds)


def test_a_provider_that_says_when_to_come_back_is_left_alone_until_then() -> None:
    clock = Hours()
    llm = judge(raises(Declined(429, Retry_After="120")), breaker=CircuitBreaker(cooldown_s=30, clock=clock))
    with pytest.raises(EndpointBusy) as caught:
        llm.open().ask(question())
    assert caught.value.wait_s == 120
    clock.now += 119
    assert llm.breaker.state == "open"
    clock.now += 1
    assert llm.breaker.state == "half-open"


def test_a_provider_that_says_nothing_of_when_is_asked_again() -> None:
    llm = judge(raises(Declined(429)))
    with pytest.raises(EndpointBusy):
        llm.open().ask(question())
    assert llm.breaker.state == "closed"


@pytest.mark.parametrize(
    ("error", "raised", "state"),
    [
        (Declined(400), QuestionRefused, "closed"),
        (Declined(413), QuestionRefused, "closed"),
        (ContextOverflow("600 tokens; 511 fit"), QuestionRefused, "closed"),
        (Declined(401), EndpointRefused, "open"),
        (ModelNotFound("no such model"), EndpointRefused, "open"),
    ],
)
def test_only_what_would_meet_every_question_closes_it_to_others(
    error: Exception, raised: type[EndpointRefused], state: str
) -> None:
    llm = judge(raises(error))
    for _ in range(3):
        with pytest.raises(raised) as caught:
            llm.open().ask(question())
        assert type(caught.value) is raised
    assert llm.breaker.state == state


def test_a_caller_without_time_does_not_close_it_to_others(release: threading.Event) -> None:
    def late(text: str) -> int:
        release.wait(20)
        return 1

    llm = judge(late)
    for _ in range(3):
        with pytest.raises(OutOfTime):
            llm.open().ask(question(seconds=0.05))
    release.set()
    assert llm.open().ask(question()).scores


def test_previews_that_run_out_of_memory_do_not_take_the_answer_down(monkeypatch: pytest.MonkeyPatch) -> None:
    def starved(*given: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(module, "previews", starved)
    budget = Budget(usd="1", escalations=9)
    steps = answer(judge(first_shown), always(), budget)
    assert {step.escalation.outcome for step in steps if step.escalation} == {"failed"}
    assert "out of memory" in steps[0].escalation.reason  # type: ignore[union-attr]
    assert [step.token_id for step in steps] == [step.wanted_id for step in steps]
    assert (budget.state().spent["escalations"], budget.state().holds) == (0, 0)
