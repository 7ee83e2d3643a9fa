"""The circuit breaker: closed, open after failures, half-open for one question at a time."""

from contextlib import ExitStack

import pytest

from s2t_agents.errors import ConfigError, EndpointBusy, EndpointDown, EscalationFailed, OutOfTime, QuestionRefused
from s2t_agents.llms import CircuitBreaker


class Hours:
    """A clock that stands still until it is moved."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Hours:
    return Hours()


def breaker(clock: Hours) -> CircuitBreaker:
    return CircuitBreaker(failures=3, cooldown_s=30, clock=clock)


def fail(b: CircuitBreaker, error: Exception | None = None) -> None:
    error = error or EscalationFailed("late")
    with pytest.raises(type(error)), b.attempt():
        raise error


def succeed(b: CircuitBreaker) -> None:
    with b.attempt():
        pass


def refuses(b: CircuitBreaker) -> bool:
    with pytest.raises(EscalationFailed, match="failed before"), b.attempt():
        raise AssertionError("let through")
    return True


def test_it_opens_after_so_many_failures_in_a_row(clock: Hours) -> None:
    b = breaker(clock)
    for _ in range(2):
        fail(b)
    succeed(b)  # the row is broken
    for _ in range(2):
        fail(b)
    assert b.state == "closed"
    fail(b)
    assert b.state == "open"
    assert refuses(b)


def test_an_endpoint_that_can_not_be_reached_opens_it_at_once(clock: Hours) -> None:
    b = breaker(clock)
    fail(b, EndpointDown("refused"))
    assert refuses(b)


def test_a_busy_endpoint_is_left_alone_for_as_long_as_it_said(clock: Hours) -> None:
    b = breaker(clock)
    fail(b, EndpointBusy("429", wait_s=5))
    clock.now += 4.9
    assert refuses(b)
    clock.now += 0.1
    succeed(b)
    assert b.state == "closed"


def test_after_the_cooldown_one_question_tries_and_the_others_wait(clock: Hours) -> None:
    b = breaker(clock)
    fail(b, EndpointDown("refused"))
    clock.now += 30
    assert b.state == "half-open"
    with b.attempt():
        assert refuses(b)
    assert b.state == "closed"


def test_a_failed_try_opens_it_for_another_cooldown(clock: Hours) -> None:
    b = breaker(clock)
    fail(b, EndpointDown("refused"))
    clock.now += 30
    fail(b)
    clock.now += 29
    assert refuses(b)
    clock.now += 1
    succeed(b)


def test_a_cancelled_try_teaches_nothing_and_blocks_nobody(clock: Hours) -> None:
    b = breaker(clock)
    fail(b, EndpointDown("refused"))
    clock.now += 30
    fail(b, ValueError("not the endpoint's fault"))
    assert b.state == "half-open"
    succeed(b)


@pytest.mark.parametrize("error", [OutOfTime("late"), QuestionRefused("400: too long")])
def test_the_callers_own_limits_teach_nothing(clock: Hours, error: EscalationFailed) -> None:
    b = breaker(clock)
    for _ in range(2):
        fail(b)
    for _ in range(3):
        fail(b, error)
    assert b.state == "closed"
    fail(b)
    assert b.state == "open"
    clock.now += 30
    fail(b, error)
    assert b.state == "half-open"


@pytest.mark.parametrize("end", [KeyboardInterrupt(), EscalationFailed("late")])
def test_a_question_from_before_it_opened_lets_no_second_try_through(clock: Hours, end: BaseException) -> None:
    b = CircuitBreaker(failures=10, cooldown_s=30, clock=clock)
    with ExitStack() as old, ExitStack() as trial:
        old.enter_context(b.attempt())  # asked while all was well
        fail(b, EndpointDown("refused"))
        clock.now += 30
        trial.enter_context(b.attempt())
        old.__exit__(type(end), end, None)
        assert refuses(b)
    assert b.state == "closed"


ENDS = {
    "success": None,
    "no connection": EndpointDown("refused"),
    "too late": EscalationFailed("late"),
    "busy without a time": EndpointBusy("503"),
    "a shorter time": EndpointBusy("429", wait_s=5),
    "interrupted": KeyboardInterrupt(),
    "the caller's fault": QuestionRefused("400: too long"),
}


def end(question: ExitStack, how: BaseException | None) -> None:
    question.__exit__(type(how) if how else None, how, None)


@pytest.mark.parametrize("end_s", [0.0, 1.0, 590.0])
@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("failures", [1, 3])
def test_questions_already_under_way_do_not_shorten_the_time_it_asked_for(
    clock: Hours, failures: int, how: str, end_s: float
) -> None:
    b = CircuitBreaker(failures=failures, cooldown_s=30, clock=clock)
    with ExitStack() as under_way:
        under_way.enter_context(b.attempt())
        fail(b, EndpointBusy("429", wait_s=600))
        clock.now += end_s
        end(under_way, ENDS[how])
    assert b.state == "open"
    clock.now += 599.9 - end_s
    assert refuses(b)
    clock.now += 30  # a connection that failed at last has its own cooldown
    succeed(b)
    assert b.state == "closed"


@pytest.mark.parametrize("how", ["success", "no connection"])
def test_nor_does_the_one_that_tries(clock: Hours, how: str) -> None:
    b = breaker(clock)
    with ExitStack() as old, ExitStack() as trial:
        old.enter_context(b.attempt())
        fail(b, EndpointDown("refused"))
        clock.now += 30
        trial.enter_context(b.attempt())
        end(old, EndpointBusy("429", wait_s=600))
        end(trial, ENDS[how])
    clock.now += 599.9
    assert refuses(b)
    clock.now += 0.1
    succeed(b)
    assert b.state == "closed"


def test_a_success_under_way_closes_one_that_was_not_asked_to_wait(clock: Hours) -> None:
    b = breaker(clock)
    with b.attempt():
        fail(b, EndpointDown("refused"))
        assert b.state == "open"
    assert b.state == "closed"


@pytest.mark.parametrize("setting", [{"failures": 0}, {"cooldown_s": -1}, {"cooldown_s": float("nan")}])
def test_settings_that_can_not_work_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="a breaker needs"):
        CircuitBreaker(**setting)  # type: ignore[arg-type]
