"""Limits on local work: answers, their tokens and time, in the same tree of budgets, never overspent."""

# ruff: noqa: F811  (fixtures are imported by name)

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from budget_support import ONE, FakeClock, Place, open_store, place, redis_server, shared_place  # noqa: F401
from langchain_core.messages import AIMessage

from s2t_agents import Budget, ChatS2T, Ledger
from s2t_agents.budget import PER_DAY, Charge, LimitWarning, MemoryStore, SQLiteStore
from s2t_agents.budget.quantities import Counts
from s2t_agents.chat.unfinished_answers import Unfinished
from s2t_agents.errors import BadLimit, BudgetError, BudgetExceeded, ContextOverflow, HoldClosed, StoreUnavailable
from s2t_agents.testing import tiny_model
from s2t_agents.triggers import always

TOKENS = 12
LOOK = {
    "name": "look",
    "description": "Look something up.",
    "parameters": {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]},
}


def chat(**settings: Any) -> ChatS2T:
    return ChatS2T(model=tiny_model(), **{"max_tokens": TOKENS, **settings})


def s2t(answer: Any) -> dict[str, Any]:
    return answer.response_metadata["s2t"]


def length(answer: Any) -> int:
    return int(s2t(answer)["tokens"])


@pytest.fixture(scope="module")
def whole() -> AIMessage:
    """The answer to "hello" that nothing limits but ``max_tokens``."""
    answer = chat().invoke("hello")
    assert length(answer) == TOKENS
    return answer


# ------------------------------------------------------------------ tokens


def test_an_answer_ends_where_its_tokens_do_and_the_next_cannot_begin(place: Place, whole: AIMessage) -> None:
    ledger = Ledger()
    run = place.budget(answer_tokens=20, name="run")
    model = chat(budget=run.child("agent"), ledger=ledger)
    first, second = model.invoke("hello"), model.invoke("hello")
    assert (first.content, first.response_metadata["finish_reason"]) == (whole.content, "length")
    assert "stopped_by" not in s2t(first)  # by max_tokens
    assert (length(second), second.response_metadata["finish_reason"]) == (8, "length")
    assert s2t(second)["stopped_by"] == {"budget": "run", "unit": "answer_tokens", "limit": 20}
    with pytest.raises(BudgetExceeded, match="'run' cannot hold 12 answer tokens: limit 20, spent 20") as refused:
        model.invoke("hello")
    assert "extend(answer_tokens=...)" in refused.value.hint
    assert run.state().spent["answer_tokens"] == 20
    assert run.state().holds == 0
    records = ledger.records()
    assert [record.stopped_by and record.stopped_by.unit for record in records] == [None, "answer_tokens"]


def test_what_an_answer_did_not_need_is_given_back() -> None:
    budget = Budget(answer_tokens=TOKENS + 3)
    answer = chat(stop=[chat().invoke("hello").text[2:4]]).invoke("hello", s2t_budget=budget)
    assert 0 < length(answer) < TOKENS
    state = budget.state()
    assert (state.spent["answer_tokens"], state.held["answer_tokens"]) == (length(answer), 0)


def test_a_call_fits_into_the_tokens_that_are_left_or_is_not_begun() -> None:
    model = chat(max_tokens=60).bind_tools([LOOK], tool_choice="any")
    needed = length(model.invoke("hello"))
    exact = model.invoke("hello", s2t_budget=Budget(answer_tokens=needed))
    assert exact.tool_calls[0]["args"]["n"] in (1, 2)
    budget = Budget(answer_tokens=5)
    with pytest.raises(BudgetExceeded, match="limit 5"):
        model.invoke("hello", s2t_budget=budget)
    assert budget.state().spent["answer_tokens"] == 0
    assert budget.state().holds == 0


@pytest.mark.parametrize("on_exhausted", ["degrade", "raise"])
def test_an_answer_that_is_whole_before_its_tokens_are_used_is_not_cut_off(on_exhausted: Any) -> None:
    model = chat(max_tokens=60).bind_tools([LOOK], tool_choice="any")
    needed = length(model.invoke("hello"))
    budget = Budget(answer_tokens=needed + 2, on_exhausted=on_exhausted)  # fewer than it may have
    answer = model.invoke("hello", s2t_budget=budget)
    assert answer.tool_calls
    assert "stopped_by" not in s2t(answer)
    assert budget.state().spent["answer_tokens"] == length(answer) == needed


def refused_elsewhere() -> None:
    Budget(escalations=0, name="elsewhere").reserve(Charge(Decimal(0)))


def unavailable_elsewhere() -> None:
    raise StoreUnavailable("the store of 'elsewhere' is away")


@pytest.mark.parametrize("fail", [refused_elsewhere, unavailable_elsewhere])
def test_what_another_budget_refuses_is_raised_and_ends_no_answer_quietly(fail: Callable[[], None]) -> None:
    class Asking:
        """A selector that spends from a budget of its own."""

        steps = 0

        def scores(self, proposal: Any) -> Any:
            self.steps += 1
            if self.steps > 3:
                fail()
            return proposal.candidate_log_probs

    budget = Budget(answer_tokens=50)
    with pytest.raises(BudgetError, match="elsewhere"):
        chat(selector=Asking(), trigger=always(), budget=budget).invoke("hello")
    assert budget.state().spent["answer_tokens"] == 3
    assert budget.state().holds == 0


def test_raise_lets_the_refusal_out_and_the_next_try_goes_on_without_paying_twice(whole: AIMessage) -> None:
    budget = Budget(answer_tokens=5, answers=1, on_exhausted="raise")
    ledger, unfinished = Ledger(), Unfinished()
    model = chat(ledger=ledger)
    with pytest.raises(BudgetExceeded, match="answer_tokens"):
        model.invoke("hello", s2t_budget=budget, s2t_unfinished=unfinished)
    assert budget.state().spent["answer_tokens"] == 5
    budget.extend(answer_tokens=7)
    answer = model.invoke("hello", s2t_budget=budget, s2t_unfinished=unfinished)
    assert answer.content == whole.content
    assert budget.state().spent["answer_tokens"] == TOKENS
    assert budget.state().spent["answers"] == 1
    assert "BudgetExceeded" in (ledger.records()[0].error or "")


# ------------------------------------------------------------------ answers


def test_answers_are_counted_where_one_came(place: Place) -> None:
    budget = place.budget(answers=2)
    model = chat(budget=budget)
    with pytest.raises(ContextOverflow):
        model.invoke("hello " * 200)
    assert budget.state().left == {"answers": 2}
    for _ in range(2):
        model.invoke("hello")
    with pytest.raises(BudgetExceeded, match="cannot hold 1 answer: limit 2, spent 2"):
        model.invoke("hello")
    assert budget.state().spent["answers"] == 2


def test_a_reader_who_leaves_has_taken_what_came() -> None:
    budget = Budget(answer_tokens=50, answers=3)
    stream = chat(budget=budget).stream("hello")
    next(stream)
    assert budget.state().held == {"answer_tokens": TOKENS, "answers": 1}
    stream.close()
    state = budget.state()
    assert 1 <= state.spent["answer_tokens"] < TOKENS
    assert (state.spent["answers"], state.holds) == (1, 0)


async def test_async_calls_are_counted_alike() -> None:
    budget = Budget(answer_tokens=20)
    model = chat(budget=budget)
    lengths = [length(await model.ainvoke("hello")) for _ in range(2)]
    assert lengths == [12, 8]
    with pytest.raises(BudgetExceeded):
        async for _ in model.astream("hello"):
            pass


# ------------------------------------------------------------------ seconds


@pytest.mark.parametrize("mode", ["degrade", "raise"])
def test_a_deadline_interrupts_an_answer_within_a_step(mode: Any) -> None:
    step_s, limit_s = 0.05, 0.6
    model = chat(max_tokens=200, on_step=lambda trace, step: time.sleep(step_s), ledger=(ledger := Ledger()))
    model.engine  # noqa: B018 - loading is not on the clock
    budget = Budget(seconds=limit_s, on_exhausted=mode, name="short")
    if mode == "raise":
        with pytest.raises(BudgetExceeded, match=r"'short': its 0.6 seconds are over"):
            model.invoke("hello", s2t_budget=budget)
    else:
        answer = model.invoke("hello", s2t_budget=budget)
        assert answer.response_metadata["finish_reason"] == "length"
        assert s2t(answer)["stopped_by"] == {"budget": "short", "unit": "seconds", "limit": limit_s}
    [record] = ledger.records()
    assert 1 <= record.completion_tokens <= limit_s / step_s + 1
    with pytest.raises(BudgetExceeded, match="are over"):  # and nothing begins after it
        model.invoke("hello", s2t_budget=budget)


def test_more_seconds_let_a_running_answer_go_on() -> None:
    def slow(trace: str, step: Any) -> None:
        if step.index == 1:
            budget.extend(seconds=600)
            time.sleep(1)

    model = chat(on_step=slow)
    model.engine  # noqa: B018 - loading is not on the clock
    budget = Budget(seconds=1)
    assert length(model.invoke("hello", s2t_budget=budget)) == TOKENS


# ------------------------------------------------------------------ at once, and where the store is away


def test_answers_at_once_never_pass_the_limit_together() -> None:
    run = Budget(answer_tokens=100)
    model = chat()
    got: list[int] = []
    refused: list[BudgetExceeded] = []

    def work(number: int) -> None:
        agent = run.child(f"agent-{number % 3}")
        try:
            while True:
                got.append(length(model.invoke("hello", s2t_budget=agent)))
        except BudgetExceeded as error:
            refused.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(refused) == 6
    assert sum(got) == run.state().spent["answer_tokens"] <= 100
    assert all(error.spent + error.held <= 100 for error in refused)


WORKER = """
import sys
sys.path[:0] = [{tests!r}]
from budget_support import open_store
from s2t_agents.budget import Budget, Charge
from s2t_agents.errors import BudgetExceeded
from decimal import Decimal

budget = Budget(store=open_store(sys.argv[1]), answers=10**6, answer_tokens=500)
mine = 0
try:
    while True:
        with budget.reserve(Charge(Decimal(0), escalations=0, answers=1, answer_tokens=7)) as hold:
            hold.settle(Charge(Decimal(0), escalations=0, answers=1, answer_tokens=5))
            mine += 5
except BudgetExceeded as refused:
    assert refused.unit == "answer_tokens"
print(mine)
"""


def test_processes_never_pass_the_limit_together(shared_place: Place, tmp_path: Path) -> None:
    budget = shared_place.budget(answers=10**6, answer_tokens=500)
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parent)))
    workers = [
        subprocess.Popen([sys.executable, str(script), shared_place.spec], stdout=subprocess.PIPE) for _ in range(2)
    ]
    total = sum(int(worker.communicate(timeout=120)[0]) for worker in workers)
    assert budget.state().spent["answer_tokens"] == total
    assert 486 <= total <= 500


def test_a_store_that_is_away_stops_answers_only_where_it_limits_them(tmp_path: Path) -> None:
    for limits, works in (({"escalations": 3}, True), ({"answer_tokens": 30}, False), ({"seconds": 30}, False)):
        path = tmp_path / f"{'-'.join(limits)}.db"
        budget = Budget(store=SQLiteStore(path, wait_s=0.1), **limits)
        path.unlink()
        if works:
            assert length(chat().invoke("hello", s2t_budget=budget)) == TOKENS
        else:
            with pytest.raises(StoreUnavailable):
                chat().invoke("hello", s2t_budget=budget)


class Leaving(MemoryStore):
    """A store that goes away, and may come back."""

    away = False

    def _there(self) -> None:
        if self.away:
            raise StoreUnavailable("the store is away")

    def reserve(self, *args: Any) -> Any:
        self._there()
        return super().reserve(*args)

    def settle(self, *args: Any) -> Any:
        self._there()
        return super().settle(*args)

    def release(self, *args: Any) -> Any:
        self._there()
        return super().release(*args)

    def read_state(self, *args: Any) -> Any:
        self._there()
        return super().read_state(*args)

    def extend(self, *args: Any) -> Any:
        self._there()
        return super().extend(*args)


@pytest.fixture(params=["sqlite", "own"])
def leaving(request: Any, tmp_path: Path) -> tuple[Any, Any]:
    """A store, and what takes it away."""
    if request.param == "own":
        store = Leaving()
        return store, lambda: setattr(store, "away", True)
    path = tmp_path / "budget.db"
    return SQLiteStore(path, wait_s=0.05), lambda: path.exists() and path.rename(tmp_path / "moved.db")


@pytest.mark.parametrize("child", [False, True], ids=["alone", "below another"])
@pytest.mark.parametrize("mode", ["degrade", "raise", "ask"])
def test_an_answer_at_work_goes_on_without_its_store_to_the_deadline_known_last(
    mode: Any, child: bool, leaving: tuple[Any, Any]
) -> None:
    store, leave = leaving

    def slow(trace: str, step: Any) -> None:
        if step.index == 1:
            leave()
        time.sleep(0.05)

    model = chat(max_tokens=200, on_step=slow, ledger=(ledger := Ledger()))
    model.engine  # noqa: B018 - loading is not on the clock
    budget = Budget(seconds=1, name="short", store=store, on_exhausted=mode, on_warning=lambda warning: None)
    call = {"s2t_budget": budget.child("agent", seconds=500, on_exhausted=mode) if child else budget}
    if mode == "degrade":
        answer = model.invoke("hello", **call)
        assert s2t(answer)["stopped_by"] == {"budget": "short", "unit": "seconds", "limit": 1}
        assert answer.response_metadata["finish_reason"] == "length"
    else:
        with pytest.raises(StoreUnavailable):
            model.invoke("hello", **call)
    [record] = ledger.records()
    assert 2 < record.completion_tokens < 200


@pytest.mark.parametrize("mode", ["degrade", "raise", "ask"])
@pytest.mark.parametrize("limits", [{}, {"answer_tokens": 8}], ids=["time", "and tokens"])
def test_a_warning_that_cannot_be_given_ends_no_answer(
    limits: dict[str, int], mode: Any, leaving: tuple[Any, Any]
) -> None:
    store, leave = leaving

    def slow(trace: str, step: Any) -> None:
        if step.index == 1:
            leave()
            time.sleep(0.3)

    model = chat(on_step=slow)
    settings: dict[str, Any] = {"on_warning": lambda warning: None, "warn_at": 0.005, "on_exhausted": mode}
    budget = Budget(seconds=60, store=store, **settings, **limits)
    if limits and mode != "degrade":
        with pytest.raises(BudgetExceeded, match="limit 8"):
            model.invoke("hello", s2t_budget=budget)
    else:
        assert length(model.invoke("hello", s2t_budget=budget)) == limits.get("answer_tokens", TOKENS)


def test_a_store_that_came_back_with_more_time_lets_the_answer_go_on() -> None:
    store = Leaving()

    def slow(trace: str, step: Any) -> None:
        if step.index == 1:
            store.away = True
            time.sleep(0.3)  # a warning is due
        if step.index == 3:
            store.away = False
            budget.extend(seconds=600)
            time.sleep(1)

    model = chat(on_step=slow)
    model.engine  # noqa: B018 - loading is not on the clock
    budget = Budget(seconds=1, store=store, on_warning=lambda warning: None, warn_at=0.1)
    assert length(model.invoke("hello", s2t_budget=budget)) == TOKENS


# ------------------------------------------------------------------ the budget itself


def test_the_tree_holds_local_work_as_it_holds_the_llms(place: Place) -> None:
    run = place.budget(answers=5, reserve_for_final=Charge(Decimal(0), escalations=0, answers=1))
    agent = run.child("agent", answer_tokens=100, window=PER_DAY)
    one = Charge(Decimal(0), escalations=0, answers=2, answer_tokens=60)
    agent.reserve(one).settle(Charge(Decimal(0), escalations=0, answers=1, answer_tokens=70))  # over its hold
    assert agent.state().overrun == {"answer_tokens": 10}
    assert (run.state().spent["answers"], run.state().spent["answer_tokens"]) == (1, 70)
    with pytest.raises(BudgetExceeded, match="100, spent 70"):
        agent.reserve(one)
    held = run.reserve(Charge(Decimal(0), escalations=0, answers=3), ttl_s=5)
    with pytest.raises(BudgetExceeded, match="kept for a last answer 1") as refused:
        run.reserve(Charge(Decimal(0), escalations=0, answers=1))
    assert (refused.value.unit, refused.value.held, refused.value.spent) == ("answers", 3, 1)
    run.final().reserve(Charge(Decimal(0), escalations=0, answers=1)).release()
    assert run.available() == {"answers": 0}
    place.advance(6)
    with pytest.raises(Exception, match="lapsed"):
        held.settle(Charge(Decimal(0), escalations=0, answers=3))
    assert run.state().overrun == {"answers": 3, "answer_tokens": 10}
    assert run.extend(answers=2, once="more")
    assert run.state().left == {"answers": 3}
    with pytest.raises(BadLimit, match="no limit in answer_tokens"):
        run.extend(answer_tokens=1)
    place.advance(86_400)
    assert agent.state().left == {"answer_tokens": 100}
    json.dumps(agent.state().as_dict())


@pytest.mark.parametrize("unit", ["answers", "answer_tokens"])
@pytest.mark.parametrize("wrong", [-1, 2.5, True, "3", 10**16])
def test_limits_that_cannot_be_meant_are_named(unit: str, wrong: Any) -> None:
    with pytest.raises(BadLimit, match=f"{unit}={wrong!r}"):
        Budget(**{unit: wrong})
    with pytest.raises(BadLimit, match=unit):
        Budget(**{unit: 5}).reserve(Charge(Decimal(0), **{unit: wrong}))


# ------------------------------------------------------------------ warnings


def test_a_warning_comes_once_for_each_limit_of_which_a_share_is_spent(place: Place) -> None:
    told: list[LimitWarning] = []
    run = place.budget(usd=1, answers=5, on_warning=told.append, name="run")
    twin = place.budget(usd=1, answers=5, on_warning=told.append, name="run")  # as in another process
    agent = run.child("agent", escalations=4)
    for at in range(5):
        charge = Charge(Decimal("0.1"), answers=1, escalations=1 if at < 4 else 0)
        agent.reserve(charge).settle(charge)
        expected = [("run", "answers", 5, 4), ("run/agent", "escalations", 4, 4)][: (0, 0, 0, 2, 2)[at]]
        assert [(w.budget, w.unit, w.limit, w.spent) for w in told] == expected
    twin.reserve(Charge(Decimal("0.3"), escalations=0)).settle(Charge(Decimal("0.3"), escalations=0))
    assert [(w.unit, w.spent) for w in told[2:]] == [("usd", Decimal("0.8"))]
    run.extend(answers=1)
    agent.reserve(Charge(Decimal(0), escalations=0)).settle(Charge(Decimal(0), escalations=0))
    assert (told[-1].limit, told[-1].spent, len(told)) == (6, 5, 4)  # a raised limit is told of again


def test_a_warning_comes_again_with_each_window_of_the_stores_clock(place: Place) -> None:
    told: list[LimitWarning] = []
    run = place.budget(escalations=4, window=PER_DAY, on_warning=told.append, warn_at=0.5, name="run")
    twin = place.budget(escalations=4, window=PER_DAY, on_warning=told.append, warn_at=0.5, name="run")
    free = Charge(Decimal(0), escalations=0)
    for day in range(1, 4):
        for budget in (run, twin, run, twin):
            budget.reserve(ONE).settle(ONE)
        assert [warning.spent for warning in told] == [2] * day
        place.advance(86_400 if day < 3 else -86_400)
    run.reserve(free).settle(free)  # a clock set back opens no window again
    assert len(told) == 3


@pytest.mark.parametrize("share", [0.1, 0.3, 0.55, 0.6, 0.7, 0.8, 0.9, 1])
@pytest.mark.parametrize("limit", ["0.05", "0.1", "0.3", "0.7", "1", "3"])
def test_a_warning_comes_at_exactly_the_share_and_not_before(limit: str, share: float) -> None:
    told: list[LimitWarning] = []
    settings: dict[str, Any] = {"on_warning": told.append, "warn_at": share}
    usd, count = Decimal(limit), int(Decimal(limit) * 100)
    dollars, counts, timed = Budget(usd=usd, **settings), Budget(answers=count, **settings), FakeClock(mono=0.0)
    deadline = Budget(seconds=count, clock=timed, **settings)
    due, least = usd * Decimal(str(share)), Decimal("1E-12")
    for step, times in ((due - least, 0), (least, 1), (least, 1)):
        dollars.reserve(Charge(Decimal(0))).settle(Charge(step))
        assert len(told) == times
    told.clear()
    for answers in range(1, count + 1):
        counts.reserve(Charge(Decimal(0), answers=1)).settle(Charge(Decimal(0), answers=1))
        assert bool(told) == (Fraction(answers) >= Fraction(str(share)) * count)
    told.clear()
    for tenths in range(10 * count):
        timed.mono = tenths / 10
        deadline.warn()
        passed = Fraction(str(deadline.state().spent["seconds"])) >= Fraction(str(share)) * count
        assert bool(told) == passed
        assert share == 1 or (deadline.seconds_to_next() == deadline.seconds_left()) == passed


def test_the_share_is_a_setting_and_a_broken_callback_takes_nothing_down(caplog: pytest.LogCaptureFixture) -> None:
    def broken(warning: LimitWarning) -> None:
        raise RuntimeError("no mail today")

    budget = Budget(answer_tokens=100, on_warning=broken, warn_at=0.1)
    assert length(chat(budget=budget).invoke("hello")) == TOKENS
    assert "on_warning failed" in caplog.text
    for wrong in (0, 1.5, -1, float("nan"), "80%", True):
        with pytest.raises(BadLimit, match="warn_at"):
            Budget(answers=1, on_warning=print, warn_at=wrong)  # type: ignore[arg-type]


def test_a_warning_that_the_store_could_not_keep_comes_with_the_next_charge() -> None:
    class Away(MemoryStore):
        away = True

        def extend(self, path: str, by: Counts, once: str = "") -> bool:
            if self.away:
                raise StoreUnavailable("away")
            return super().extend(path, by, once)

    told: list[LimitWarning] = []
    store = Away()
    budget = Budget(answers=10, on_warning=told.append, warn_at=0.1, store=store)
    one = Charge(Decimal(0), escalations=0, answers=1)
    budget.reserve(one).settle(one)
    assert not told
    store.away = False
    budget.reserve(one).settle(one)
    budget.reserve(one).settle(one)
    assert [warning.unit for warning in told] == ["answers"]


def test_a_new_window_warns_again(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[LimitWarning] = []
    now = [1_800_000_000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    budget = Budget(answers=2, window=PER_DAY, on_warning=told.append, warn_at=0.5)
    one = Charge(Decimal(0), escalations=0, answers=1)
    for day in (1, 2, 3):
        for _ in range(2):
            budget.reserve(one).settle(one)
        assert len(told) == day
        now[0] += 86_400


@pytest.mark.parametrize("view", ["itself", "another mode", "its last answer"])
def test_every_view_of_a_budget_warns(view: str) -> None:
    told: list[LimitWarning] = []
    run = Budget(answers=1, on_warning=told.append)
    seen = {"itself": run, "another mode": run.view(on_exhausted="raise"), "its last answer": run.final()}[view]
    one = Charge(Decimal(0), escalations=0, answers=1)
    seen.reserve(one).settle(one)
    assert [warning.unit for warning in told] == ["answers"]


def test_a_charge_that_comes_after_its_hold_lapsed_warns_too() -> None:
    told: list[LimitWarning] = []
    clock = FakeClock()
    budget = Budget(answers=1, on_warning=told.append, clock=clock)
    one = Charge(Decimal(0), escalations=0, answers=1)
    hold = budget.reserve(one, ttl_s=1)
    clock.advance(2)
    with pytest.raises(HoldClosed):
        hold.settle(one)
    assert [(warning.unit, warning.spent) for warning in told] == [("answers", 1)]


def test_a_deadline_warns_in_the_middle_of_an_answer() -> None:
    told: list[tuple[LimitWarning, int]] = []
    steps: list[int] = []

    def slow(trace: str, step: Any) -> None:
        steps.append(step.index)
        time.sleep(0.02)

    model = chat(max_tokens=200, on_step=slow)
    model.engine  # noqa: B018 - loading is not on the clock
    budget = Budget(seconds=1, on_warning=lambda warning: told.append((warning, len(steps))), warn_at=0.5)
    model.invoke("hello", s2t_budget=budget)
    [(warning, at)] = told
    assert (warning.unit, warning.limit) == ("seconds", 1)
    assert 0.5 <= float(warning.spent) < 1
    assert at < len(steps)
