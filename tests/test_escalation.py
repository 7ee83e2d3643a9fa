"""An escalation holds what it may cost, asks, settles what it did cost, and never takes the answer down."""

import math
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from budget_support import FakeClock

from s2t_agents import ChatS2T, Ledger
from s2t_agents.budget import Budget, Charge, MemoryStore, SQLiteStore, TokenPrice
from s2t_agents.budget.quantities import Counts
from s2t_agents.budget.store import Closing
from s2t_agents.engine.engine import Engine
from s2t_agents.errors import (
    BudgetExceeded,
    ConfigError,
    EscalationFailed,
    ModelNotFound,
    S2TError,
    StoreUnavailable,
    UnpricedModel,
)
from s2t_agents.escalation import Escalation, Pacing
from s2t_agents.llms.question import Answer, Question
from s2t_agents.scheduling.waits import finish
from s2t_agents.testing import ScriptedLLM, last_candidate, tiny_model
from s2t_agents.triggers import always
from s2t_agents.types import RefusedBy, Sampling

PRICE = TokenPrice(Decimal("2"), Decimal("10"))  # USD per million tokens


def failing(error: S2TError) -> ScriptedLLM:
    def answer(ids: object, candidates: object) -> list[float]:
        raise error

    return ScriptedLLM(answer, price=PRICE)


def ask(llm: ScriptedLLM, budget: Budget | None) -> tuple[list[float] | None, object]:
    with Escalation(llm).open_session(budget, threshold=0.5) as session:
        answer, report = finish(session.escalating(Question([1, 2, 3], [7, 8])))
    return list(answer.scores) if answer else None, report


def test_it_costs_the_uncached_prefix_and_one_token() -> None:
    budget = Budget(usd="1", escalations=5, llm_tokens=100)
    scores, report = ask(ScriptedLLM(last_candidate, price=PRICE), budget)
    assert scores == [-2.0, -1.0]
    assert report.outcome == "picked"
    assert report.actual.llm_tokens == 4
    assert report.actual.usd == Decimal("0.000016")  # 3 * 2 / 1e6 + 1 * 10 / 1e6
    spent = budget.state().spent
    assert (spent["usd"], spent["escalations"], spent["llm_tokens"]) == (Decimal("0.000016"), 1, 4)
    assert budget.state().held["escalations"] == 0


def test_an_exhausted_budget_refuses_before_the_llm_is_asked() -> None:
    llm = ScriptedLLM(last_candidate, price=PRICE)
    scores, report = ask(llm, Budget(escalations=0))
    assert (scores, report.outcome, report.actual, llm.asked) == (None, "refused", None, [])
    assert "escalations" in report.reason


@pytest.mark.parametrize("limits", [{"usd": "0.000015"}, {"llm_tokens": 3}])
def test_every_unit_can_refuse(limits: dict[str, object]) -> None:
    llm = ScriptedLLM(last_candidate, price=PRICE)
    assert ask(llm, Budget(**limits))[0] is None  # type: ignore[arg-type]
    assert llm.asked == []


@pytest.mark.parametrize(
    ("unit", "limit"), [("usd", Decimal("0.000015")), ("escalations", 0), ("llm_tokens", 3), ("seconds", 0.0)]
)
def test_a_refusal_says_what_was_asked_of_the_budget_and_which_limit_refused(unit: str, limit: Any) -> None:
    agent = Budget(name="fleet", **{unit: limit}).child("agent", escalations=9)
    report = ask(ScriptedLLM(last_candidate, price=PRICE), agent)[1]
    assert report.refused_by == RefusedBy("fleet", unit, limit)
    assert type(report.refused_by.limit) is type(limit)
    assert (report.reserved, report.actual) == (Charge(Decimal("0.000016"), 4), None)


def test_what_was_asked_of_a_budget_stays_unknown_in_dollars_where_nobody_knows_the_price() -> None:
    report = ask(ScriptedLLM(last_candidate), Budget(usd="1"))[1]
    assert (report.outcome, report.reserved, report.refused_by) == ("refused", Charge(None, 4), None)


def test_a_budget_that_says_raise_raises() -> None:
    with pytest.raises(BudgetExceeded, match="escalations"):
        ask(ScriptedLLM(last_candidate), Budget(escalations=0, on_exhausted="raise"))


@pytest.mark.parametrize("error", [EscalationFailed("it hung"), ModelNotFound("no weights")])
def test_a_failed_question_gives_the_hold_back_and_costs_nothing(error: S2TError) -> None:
    budget = Budget(escalations=1, usd="1")
    scores, report = ask(failing(error), budget)
    assert (scores, report.outcome, report.actual, report.reason) == (None, "failed", None, str(error))
    state = budget.state()
    assert (state.held["escalations"], state.spent["escalations"]) == (0, 0)


def test_a_cancelled_question_gives_the_hold_back() -> None:
    def answer(ids: object, candidates: object) -> list[float]:
        raise KeyboardInterrupt

    budget = Budget(escalations=1)
    with pytest.raises(KeyboardInterrupt):
        ask(ScriptedLLM(answer), budget)
    assert budget.state().held["escalations"] == 0


def test_an_interruption_while_the_books_are_written_loses_no_cost() -> None:
    class Interrupting(MemoryStore):
        interruptions = 1

        def settle(self, hold_id: str, actual: Counts) -> Closing:
            if self.interruptions:
                self.interruptions = 0
                raise KeyboardInterrupt
            return super().settle(hold_id, actual)

    budget = Budget(escalations=5, store=Interrupting())
    with pytest.raises(KeyboardInterrupt):
        ask(ScriptedLLM(last_candidate), budget)
    state = budget.state()
    assert (state.holds, state.spent["escalations"]) == (0, 1)


def test_an_unpriced_llm_under_a_dollar_limit_is_refused_before_anything_runs() -> None:
    unpriced = Escalation(ScriptedLLM(last_candidate))
    with pytest.raises(UnpricedModel, match="no known price"):
        unpriced.check_price(Budget(usd="1").child("agent"))
    unpriced.check_price(Budget(escalations=3))
    unpriced.check_price(None)


def test_unknown_cost_is_none_not_zero() -> None:
    _, report = ask(ScriptedLLM(last_candidate), Budget(escalations=3))
    assert report.actual.usd is None


def test_the_margin_decides_who_goes_up() -> None:
    llm = ScriptedLLM(last_candidate)
    calibrated = Escalation(llm).open_session(None, threshold=0.4)
    assert [calibrated.should_escalate(m) for m in (0.3, 0.4, 0.9)] == [True, False, False]
    assert Escalation(llm, margin=0.95).open_session(None, threshold=0.4).should_escalate(0.9)
    with pytest.raises(ConfigError, match=r"margin is 1\.5"):
        Escalation(llm, margin=1.5)


def test_a_hold_comes_back_as_soon_as_it_was_told_to_and_never_before_the_llms_deadline() -> None:
    clock = FakeClock()
    budget = Budget(escalations=9, clock=clock)
    holds: list[int] = []

    def answer(ids: object, candidates: Sequence[int]) -> list[float]:
        for seconds in (7.9, 0.2):
            clock.advance(seconds)
            holds.append(budget.state().holds)
        return [0.0 for _ in candidates]

    llm = ScriptedLLM(answer)
    with Escalation(llm, hold_s=8).open_session(budget, threshold=0.5) as session:
        finish(session.escalating(Question([1, 2, 3], [7, 8])))
    assert holds == [1, 0]
    llm.timeout_s = 5.0  # type: ignore[attr-defined]
    for wanted in (5.0, 0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match=r"hold_s is .* above 5\.0 seconds"):
            Escalation(llm, hold_s=wanted)


def test_the_llms_session_is_closed_with_the_generations() -> None:
    llm = ScriptedLLM(last_candidate)
    ask(llm, None)
    assert (llm.opened, llm.closed) == (1, 1)


# ---------------------------------------------------------------------- the store of the budget, and its holds


def test_a_store_that_is_gone_refuses_the_escalation_with_pacing_as_without(tmp_path: Path) -> None:
    budget = Budget(escalations=5, store=SQLiteStore(tmp_path / "budget.db"))
    escalation = Escalation(ScriptedLLM(last_candidate), pacing=Pacing(10))
    (tmp_path / "budget.db").rename(tmp_path / "gone.db")
    with escalation.open_session(budget, threshold=0.5) as session:
        assert [session.should_escalate(margin) for margin in (0.3, 0.6)] == [True, False]
        answer, report = finish(session.escalating(Question([1, 2, 3], [7, 8])))
    assert (answer, report.outcome) == (None, "refused")
    assert "was removed" in report.reason
    assert (report.reserved, report.refused_by) == (Charge(None, 4), None)  # no limit said no


@pytest.mark.parametrize(
    "owed",
    [
        Charge(None, 10**16),
        Charge(None, -1),
        Charge(Decimal(10**12), 4),
        Charge(Decimal("-0.1"), 4),
        {"usd": 1},
        "free",
    ],
)
def test_a_cost_that_no_budget_can_count_is_booked_as_what_was_held(owed: Any) -> None:
    class Lying(ScriptedLLM):
        def ask(self, question: Question) -> Answer:
            answer = super().ask(question)
            question.owe(owed)
            return answer

    llm, budget = Lying(last_candidate, price=PRICE), Budget(usd="1", escalations=5)
    scores, report = ask(llm, budget)
    assert (scores, report.outcome, report.actual) == ([-2.0, -1.0], "picked", report.reserved)
    state = budget.state()
    assert (state.spent["usd"], state.spent["escalations"], state.holds) == (Decimal("0.000016"), 1, 0)


class Stating(ScriptedLLM):
    """An LLM of the caller's own that quotes a cent and states these costs, one after the other."""

    def __init__(self, *stated: Charge | None) -> None:
        super().__init__(last_candidate)
        self.stated, self.fails = stated, False

    def quote(self, question: Question) -> Charge:
        return Charge(Decimal("0.01"), 5)

    def ask(self, question: Question) -> Answer:
        for charge in self.stated:
            question.owe(charge)
        if self.fails:
            raise EscalationFailed("no")
        return Answer(tuple(self.answer(question.ids, question.candidates)))


FREE = Charge(Decimal(0), escalations=0)
QUOTE = Charge(Decimal("0.01"), 5)


@pytest.mark.parametrize(
    ("stated", "answered", "failed"),
    [
        ((), QUOTE, None),
        ((None,), QUOTE, None),
        ((QUOTE, None), QUOTE, None),
        ((FREE,), FREE, FREE),
        ((QUOTE, FREE), FREE, FREE),
        ((Charge(None, 0),), Charge(None, 0), Charge(None, 0)),
        ((Charge(Decimal("0.001"), 2),), Charge(Decimal("0.001"), 2), Charge(Decimal("0.001"), 2)),
    ],
)
def test_an_answer_of_which_nothing_is_stated_costs_its_quote(
    stated: Sequence[Charge | None], answered: Charge, failed: Charge | None
) -> None:
    for fails, cost in ((False, answered), (True, failed)):
        llm, budget = Stating(*stated), Budget(usd="1", escalations=2)
        llm.fails = fails
        answer, report = ask(llm, budget)
        assert ((answer is None), report.actual) == (fails, cost)
        state, due = budget.state(), cost or FREE
        usd = QUOTE.usd if due.usd is None else due.usd  # dollars that are not known are booked as held
        spent = tuple(state.spent[unit] for unit in ("usd", "llm_tokens", "escalations"))
        assert (*spent, state.holds) == (usd, due.llm_tokens, due.escalations, 0)


def test_a_budget_limits_an_llm_that_states_nothing() -> None:
    ledger, budget = Ledger(), Budget(escalations=2)
    chat = ChatS2T(
        model=tiny_model(), trigger=always(), escalation=Escalation(Stating(), margin=1.0), budget=budget,
        ledger=ledger, max_tokens=5,
    )  # fmt: skip
    s2t = chat.invoke("hello").response_metadata["s2t"]
    assert (s2t["escalations"], s2t["refused"], s2t["cost_usd"]["llm"]) == (2, 3, 0.02)
    assert budget.state().spent["escalations"] == ledger.total().escalations == 2
    assert ledger.total().cost_usd.llm.usd == Decimal("0.02")


@pytest.mark.parametrize("usd", [0.25, "0.25", Decimal("0.250")])
def test_a_cost_in_numbers_of_another_type_is_dollars(usd: Any) -> None:
    class Careless(ScriptedLLM):
        def quote(self, question: Question) -> Charge:
            return Charge(usd, 4)

    report = ask(Careless(last_candidate), Budget(usd="1"))[1]
    assert report.reserved == report.actual == Charge(Decimal("0.25"), 4)
    assert type(report.actual.usd) is Decimal


@pytest.mark.parametrize(("timeout_s", "took_s"), [(None, 3000), (math.inf, 3000), (900.0, 901), (10.0, 299)])
def test_a_hold_lives_until_the_llm_has_answered(timeout_s: float | None, took_s: float) -> None:
    clock = FakeClock()
    budget = Budget(escalations=1, clock=clock)

    def slow(ids: Sequence[int], candidates: Sequence[int]) -> list[float]:
        clock.advance(took_s)
        with pytest.raises(BudgetExceeded):
            budget.reserve(Charge())
        return last_candidate(ids, candidates)

    llm = ScriptedLLM(slow)
    if timeout_s is not None:
        llm.timeout_s = timeout_s  # type: ignore[attr-defined]
    assert ask(llm, budget)[1].outcome == "picked"  # type: ignore[attr-defined]
    assert budget.state().spent["escalations"] == 1


# ---------------------------------------------------------------------- LLMs of one's own


class Own(ScriptedLLM):
    """An LLM of the caller's own, which may answer with anything."""

    def __init__(self, gives: Callable[[int], Any]) -> None:
        super().__init__(last_candidate)
        self.gives = gives

    def ask(self, question: Question) -> Any:
        question.owe(self.quote(question))
        return self.gives(len(question.candidates))


NOT_ANSWERS: dict[str, Callable[[int], Any]] = {
    "nothing": lambda k: None,
    "a list": lambda k: [0.0] * k,
    "too few": lambda k: Answer((0.0,) * (k - 1)),
    "too many": lambda k: Answer((0.0,) * (k + 1)),
    "none at all": lambda k: Answer(()),
    "no number": lambda k: Answer((None,) * k),
    "nan": lambda k: Answer((float("nan"), *[-1.0] * (k - 1))),
    "inf": lambda k: Answer((float("inf"), *[-1.0] * (k - 1))),
    "all impossible": lambda k: Answer((-float("inf"),) * k),
    "strings": lambda k: Answer(("1.0",) * k),  # type: ignore[arg-type]
    "a string": lambda k: Answer("1" * k),  # type: ignore[arg-type]
    "booleans": lambda k: Answer((True,) * k),
    "objects": lambda k: Answer((object(),) * k),  # type: ignore[arg-type]
    "then text": lambda k: Answer((0.0,) * k, then=("x",)),  # type: ignore[arg-type]
    "then beyond the vocabulary": lambda k: Answer((0.0,) * k, then=(10**9,)),
    "then negative": lambda k: Answer((0.0,) * k, then=(-1,)),
    "an error of its own": lambda k: [][k],
    "a division by zero": lambda k: 1 / 0,
}


@pytest.mark.parametrize("what", NOT_ANSWERS)
def test_what_is_no_answer_is_paid_for_and_leaves_the_local_pick(what: str) -> None:
    budget = Budget(escalations=100)
    engine = Engine(tiny_model(), k=4, trigger=always(), escalation=Escalation(Own(NOT_ANSWERS[what]), margin=1.0))
    steps = list(engine.steps([10, 20, 30], Sampling(max_tokens=5), budget=budget))
    assert len(steps) == 5
    for step in steps:
        assert step.picked_by == "slm"
        assert step.escalation is not None
        assert step.escalation.outcome == "failed"
        assert step.escalation.reason
        assert step.escalation.actual is not None
    assert budget.state().spent["escalations"] == 5
    assert budget.state().holds == 0


class BadQuote(ScriptedLLM):
    def quote(self, question: Question) -> Any:
        return {"usd": 1}


def test_a_quote_that_is_none_leaves_the_local_pick_and_holds_nothing() -> None:
    budget = Budget(escalations=100)
    engine = Engine(tiny_model(), k=4, trigger=always(), escalation=Escalation(BadQuote(last_candidate), margin=1.0))
    steps = list(engine.steps([10, 20, 30], Sampling(max_tokens=3), budget=budget))
    assert [step.escalation.outcome for step in steps if step.escalation] == ["failed"] * 3
    assert budget.state().spent["escalations"] == budget.state().holds == 0


@pytest.mark.parametrize("number", [torch.tensor(-0.5), np.float32(-0.5), Decimal("-0.5"), -1])
def test_numbers_of_any_library_are_scores(number: Any) -> None:
    llm = Own(lambda k: Answer((number, *[-9.0] * (k - 1))))
    engine = Engine(tiny_model(), k=4, trigger=always(), escalation=Escalation(llm, margin=1.0))
    [step] = engine.steps([10, 20, 30], Sampling(max_tokens=1))
    assert step.picked_by == "llm"
    assert step.candidates[0].llm == float(number)


class Gone(MemoryStore):
    """A store that cannot be reached, as often as it is tried."""

    tried = 0

    def reserve(self, *args: Any, **options: Any) -> Any:
        self.tried += 1
        raise StoreUnavailable("the store is gone.")


@pytest.mark.parametrize("pacing", [None, Pacing(selections=100)], ids=["each", "paced"])
def test_an_answer_waits_once_for_a_store_that_is_gone(pacing: Pacing | None) -> None:
    store = Gone()
    llm = ScriptedLLM(last_candidate)
    escalation = Escalation(llm, margin=1.0, pacing=pacing)
    model = ChatS2T(model=tiny_model(), max_tokens=6, trigger=always(), escalation=escalation)
    for again in (1, 2):
        answer = model.invoke("hello", s2t_budget=Budget(escalations=9, store=store))
        s2t = answer.response_metadata["s2t"]
        assert (store.tried, s2t["escalations"], llm.asked) == (again, 0, [])
        assert s2t["refused"] > 1
        assert s2t["degraded"]
