"""What every store promises: one suite over memory, SQLite and Redis."""

# ruff: noqa: F811  (fixtures are imported by name)

from __future__ import annotations

import copy
import gc
import pickle
import sys
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from budget_support import FULL, ONE, Place, make_place, place, redis_server, shared_place  # noqa: F401

from s2t_agents.budget import PER_DAY, Budget, Charge, Window, memory_store
from s2t_agents.errors import BadLimit, BudgetExceeded, HoldClosed, StoreUnavailable, UnpricedModel


def cents(n: int, escalations: int = 0, tokens: int = 0) -> Charge:
    return Charge(Decimal(n) / 100, tokens, escalations=escalations)


def test_a_reservation_is_held_then_replaced_by_what_was_used(place: Place) -> None:
    budget = place.budget(usd="1", escalations=3)
    hold = budget.reserve(cents(40, 1, 900))
    assert budget.state().held == {"usd": Decimal("0.4"), "escalations": 1}
    assert budget.state().holds == 1
    hold.settle(cents(25, 1, 850))
    state = budget.state()
    assert state.spent == {"usd": Decimal("0.25"), "escalations": 1, "llm_tokens": 850}
    assert state.held == {"usd": 0, "escalations": 0}
    assert state.left == {"usd": Decimal("0.75"), "escalations": 2}
    assert state.holds == 0
    assert not state.overrun


def test_a_released_hold_costs_nothing(place: Place) -> None:
    budget = place.budget(usd=1)
    budget.reserve(cents(40)).release()
    assert budget.state().left == {"usd": 1}


def test_leaving_the_block_releases_what_nobody_settled(place: Place) -> None:
    budget = place.budget(usd=1)
    with pytest.raises(RuntimeError), budget.reserve(cents(40)):
        raise RuntimeError("the LLM is down")
    assert budget.state().left == {"usd": 1}


def test_what_does_not_fit_is_refused_with_every_figure(place: Place) -> None:
    budget = place.budget(usd=1, name="fleet")
    budget.reserve(cents(30)).settle(cents(30))
    budget.reserve(cents(50))
    with pytest.raises(BudgetExceeded) as refused:
        budget.reserve(cents(21))
    error = refused.value
    assert (error.unit, error.limit, error.spent, error.held, error.wanted, error.budget) == (
        "usd",
        Decimal(1),
        Decimal("0.3"),
        Decimal("0.5"),
        Decimal("0.21"),
        "fleet",
    )
    assert "0.21 USD" in str(error)
    assert error.hint in str(error)
    budget.reserve(cents(20))  # exactly what is left fits


def test_a_limit_is_met_to_the_last_pico_dollar(place: Place) -> None:
    limit = Decimal("900000.000000000003")
    budget = place.budget(usd=limit)
    budget.reserve(Charge(limit - Decimal("0.000000000002"), escalations=0)).settle(
        Charge(limit - Decimal("0.000000000002"), escalations=0)
    )
    with pytest.raises(BudgetExceeded):
        budget.reserve(Charge(Decimal("0.000000000003"), escalations=0))
    budget.reserve(Charge(Decimal("0.000000000001"), escalations=0))
    budget.reserve(Charge(Decimal("0.000000000001"), escalations=0))
    with pytest.raises(BudgetExceeded):
        budget.reserve(Charge(Decimal("0.0000000000001"), escalations=0))  # a fraction counts as a whole one


def test_a_reservation_holds_on_the_whole_chain_or_nowhere(place: Place) -> None:
    fleet = place.budget(escalations=10, name="fleet")
    run = fleet.child("run", escalations=2)
    agent = run.child("agent", usd=1)
    agent.reserve(cents(10, 1)).settle(cents(5, 1))
    agent.reserve(cents(10, 1))
    with pytest.raises(BudgetExceeded) as refused:
        agent.reserve(cents(10, 1))
    assert refused.value.budget == "fleet/run"
    for budget in (fleet, run, agent):
        assert budget.state().spent["escalations"] == 1
        assert budget.state().holds == 1
    assert agent.path == "fleet/run/agent"
    assert agent.state().held == {"usd": Decimal("0.1")}
    assert [budget.name for budget in agent.chain] == ["fleet", "run", "agent"]


def test_what_is_available_is_the_least_in_the_chain(place: Place) -> None:
    run = place.budget(escalations=10, usd=1, seconds=60)
    agent = run.child("agent", escalations=4, reserve_for_final=Charge(Decimal(0)))
    run.child("other").reserve(ONE).settle(cents(70, 1))
    assert agent.available()["escalations"] == 3
    assert agent.available()["usd"] == Decimal("0.3")
    assert agent.final().available()["escalations"] == 4


def test_a_child_of_one_name_is_one_meter(place: Place) -> None:
    run = place.budget(escalations=10)
    run.child("a", escalations=2).reserve(ONE).settle(ONE)
    assert run.child("a").state().spent["escalations"] == 1
    assert run.child("a", escalations=2).state().left == {"escalations": 1}
    with pytest.raises(BadLimit, match=r"escalations=2, not escalations=3.*extend"):
        run.child("a", escalations=3)


def test_the_finalization_reserve_is_for_the_last_answer_only(place: Place) -> None:
    run = place.budget(escalations=3, reserve_for_final=Charge(Decimal(0)))
    run.reserve(ONE)
    run.reserve(ONE)
    with pytest.raises(BudgetExceeded, match="kept for a last answer 1"):
        run.reserve(ONE)
    run.final().reserve(ONE)
    with pytest.raises(BudgetExceeded) as over:
        run.final().reserve(ONE)
    assert "kept" not in str(over.value)


def test_a_childs_last_answer_does_not_take_its_parents_reserve(place: Place) -> None:
    run = place.budget(escalations=1, reserve_for_final=Charge(Decimal(0)))
    with pytest.raises(BudgetExceeded):
        run.child("agent").final().reserve(ONE)


def test_more_than_was_reserved_is_booked_in_full_and_the_next_is_refused(place: Place) -> None:
    run = place.budget(usd=1, name="run")
    agent = run.child("agent", usd="0.5")
    agent.reserve(cents(30)).settle(cents(120))
    assert agent.state().spent["usd"] == Decimal("1.2")
    assert agent.state().overrun == {"usd": Decimal("0.9")}
    assert agent.state().left == {"usd": 0}
    assert run.state().overrun == {"usd": Decimal("0.9")}  # the parent was told
    for budget in (agent, run):
        with pytest.raises(BudgetExceeded):
            budget.reserve(cents(1))


def test_a_hold_is_closed_once(place: Place) -> None:
    budget = place.budget(usd=1)
    settled, released = budget.reserve(cents(10)), budget.reserve(cents(10))
    settled.settle(cents(10))
    released.release()
    for again in (lambda: settled.settle(cents(10)), settled.release, released.release):
        with pytest.raises(HoldClosed, match="before"):
            again()
    assert budget.state().spent["usd"] == Decimal("0.1")


def test_the_store_itself_refuses_to_close_twice(place: Place) -> None:
    budget = place.budget(usd=1)
    hold = budget.reserve(cents(10))
    twin = copy.copy(hold)  # as after a fork: the second object does not know about the first
    hold.settle(cents(10))
    with pytest.raises(HoldClosed):
        twin.settle(cents(10))
    assert budget.state().spent["usd"] == Decimal("0.1")


def test_a_hold_lapses_when_its_owner_is_gone(place: Place) -> None:
    budget = place.budget(usd=1)
    budget.reserve(cents(90), ttl_s=5)
    place.advance(4)
    with pytest.raises(BudgetExceeded):
        budget.reserve(cents(90))
    place.advance(2)
    assert budget.state().held == {"usd": 0}
    assert budget.state().holds == 0
    budget.reserve(cents(90))


def test_settling_a_lapsed_hold_says_so_and_books_it_once(place: Place) -> None:
    run = place.budget(usd=1)
    agent = run.child("agent")
    hold = agent.reserve(cents(40), ttl_s=5)
    place.advance(6)
    agent.reserve(cents(80))  # the lapsed 40 cents are free again
    with pytest.raises(HoldClosed, match="booked as overrun"):
        hold.settle(cents(40))
    for budget in (run, agent):
        assert budget.state().spent["usd"] == Decimal("0.4")
        assert budget.state().overrun == {"usd": Decimal("0.4")}
    with pytest.raises(HoldClosed):
        hold.settle(cents(40))
    assert run.state().spent["usd"] == Decimal("0.4")
    with pytest.raises(BudgetExceeded):
        run.reserve(cents(1))


def test_releasing_a_lapsed_hold_says_so_and_costs_nothing(place: Place) -> None:
    budget = place.budget(usd=1)
    hold = budget.reserve(cents(40), ttl_s=5)
    place.advance(6)
    with pytest.raises(HoldClosed):
        hold.release()
    assert budget.state().left == {"usd": 1}


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_a_turn_takes_no_more_steps_the_more_holds_have_lapsed(kind: str, tmp_path: Path) -> None:
    place = make_place(kind, tmp_path)
    agent = place.budget(usd=1).child("agent", escalations=10**6)
    steps = 0

    def count(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal steps
        steps += event == "line"
        return count

    def turn() -> int:
        """One of the many that lost a hold: the lines that it ran."""
        nonlocal steps
        place.advance(6)
        steps, before = 0, sys.gettrace()
        sys.settrace(count)
        try:
            agent.reserve(ONE, ttl_s=5)  # for nobody: it lapses before the next turn
            agent.reserve(ONE).settle(ONE)
            agent.state()
        finally:
            sys.settrace(before)
        return steps

    gc.collect()
    gc.disable()  # what other tests have left would be finalized, and counted, here
    try:
        turns = [turn() for _ in range(300)]
    finally:
        gc.enable()
    assert max(turns[100:]) <= max(turns[10:50])


@pytest.mark.parametrize("held_s", [5, 500])
def test_memory_remembers_the_holds_that_lapsed_last(monkeypatch: pytest.MonkeyPatch, held_s: int) -> None:
    monkeypatch.setattr(memory_store, "TOMBSTONES", 3)
    place = make_place("memory", Path())
    budget = place.budget(usd=1)
    lost = {}
    for cost in (1, 2, 4, 8, 16):
        lost[cost] = budget.reserve(cents(cost), ttl_s=held_s)
        budget.reserve(ONE, ttl_s=held_s).release()
        place.advance(held_s + 1)
    assert budget.state().holds == 0
    for cost, hold in lost.items():
        with pytest.raises(HoldClosed):
            hold.settle(cents(cost))
    assert budget.state().spent["usd"] == Decimal("0.28")


def test_a_shared_store_forgets_a_hold_a_week_after_it_lapsed(place: Place) -> None:
    budget = place.budget(usd=1)
    lost = []
    for seconds in (7 * 86_400, 9):
        lost.append(budget.reserve(cents(10), ttl_s=5))
        place.advance(6)
        assert budget.state().holds == 0
        place.advance(seconds)
    budget.reserve(ONE, ttl_s=1)
    place.advance(2)
    assert budget.state().holds == 0
    for hold in lost:
        with pytest.raises(HoldClosed):
            hold.settle(cents(10))
    assert budget.state().spent["usd"] == Decimal("0.2" if place.kind == "memory" else "0.1")


def test_holds_lapse_in_the_order_of_their_time_whatever_was_closed_between(place: Place) -> None:
    budget = place.budget(usd=1)
    kept = {ttl: budget.reserve(cents(1), ttl_s=ttl) for ttl in (50, 20, 90, 10, 70)}
    for _ in range(200):  # more than are kept, closed long before their time
        budget.reserve(cents(1), ttl_s=30).settle(ONE)
    kept.pop(20).release()
    for now in range(0, 100, 5):
        assert budget.state().holds == sum(ttl > now for ttl in kept)
        place.advance(5)


def test_a_deadline_refuses_what_comes_after_it(place: Place) -> None:
    budget = place.budget(seconds=30)
    child = budget.child("agent", seconds=10)
    assert child.seconds_left() == pytest.approx(10, abs=1)
    place.advance(11)
    budget.reserve(ONE)
    with pytest.raises(BudgetExceeded, match="10 seconds are over") as refused:
        child.reserve(ONE)
    assert refused.value.unit == "seconds"
    assert child.seconds_left() == 0
    assert budget.seconds_left() == pytest.approx(19, abs=1)
    assert budget.child("other").seconds_left() == pytest.approx(19, abs=1)
    assert place.budget(name="free").seconds_left() is None


def test_limits_can_be_raised_while_running(place: Place) -> None:
    budget = place.budget(escalations=1, usd="0.1", seconds=10)
    budget.reserve(cents(10, 1)).settle(cents(10, 1))
    budget.extend(escalations=3)
    with pytest.raises(BudgetExceeded, match="usd"):
        budget.reserve(cents(1, 1))
    budget.extend(usd="0.05")
    budget.reserve(cents(1, 1))
    assert budget.state().limit == {"escalations": 4, "usd": Decimal("0.15"), "seconds": 10}
    place.advance(500)
    with pytest.raises(BudgetExceeded):
        budget.reserve(cents(1, 1))
    budget.extend(seconds=10)  # counts from now
    assert budget.seconds_left() == pytest.approx(10, abs=1)
    budget.reserve(cents(1, 1))
    with pytest.raises(BadLimit, match="no limit in llm_tokens"):
        budget.extend(llm_tokens=5)


def test_a_named_grant_counts_once_and_its_first_amount_stands(place: Place) -> None:
    budget = place.budget(escalations=1, usd=1)
    child = budget.child("agent", escalations=1)
    assert budget.extend(escalations=2, once="question 1")
    assert not budget.extend(escalations=50, usd=3, once="question 1")
    assert budget.extend(escalations=1, once="question 2")
    assert child.extend(escalations=4, once="question 1")  # another budget's question
    assert budget.extend(escalations=1)  # without a name every call counts
    assert budget.extend(escalations=1)
    assert budget.state().limit == {"usd": 1, "escalations": 6}
    assert child.state().limit == {"escalations": 5}


LARGEST: dict[str, Any] = {
    "usd": Decimal(1_000_000),
    **dict.fromkeys(("escalations", "llm_tokens", "answers", "answer_tokens"), 10**15),
    "seconds": 315_360_000,
}


@pytest.mark.parametrize("unit", LARGEST)
def test_a_limit_is_raised_to_the_largest_that_can_be_given_and_no_further(place: Place, unit: str) -> None:
    largest = LARGEST[unit]
    half = largest // 2
    budget = place.budget(**{unit: half})
    budget.extend(**{unit: half})
    for more in (half, largest, Decimal("1E-12") if unit == "usd" else 1):
        with pytest.raises(BadLimit, match=f"limit in {unit} would be .*, above {largest:,}") as refused:
            budget.extend(**{unit: more}, once="a grant")
        assert refused.value.hint
        assert budget.state().limit[unit] == largest
    assert budget.reserve(Charge(Decimal(0))).open


@pytest.mark.parametrize("unit", [*LARGEST][:-1])
def test_a_sum_beyond_what_a_budget_counts_is_refused_and_nothing_is_changed(place: Place, unit: str) -> None:
    most = Decimal(FULL) if unit == "usd" else 10**15
    nothing = Charge(Decimal(0), escalations=0)
    one = replace(nothing, **{unit: most})
    parent = place.budget(name="parent")
    budget = parent.child("child")
    held = [budget.reserve(nothing) for _ in range(12)]
    for hold in held[: 3 if unit == "usd" else 9]:
        hold.settle(one)
    state = budget.state()
    assert state.spent[unit] == state.overrun[unit] == (9 * 10**6 if unit == "usd" else 9 * 10**15)
    with pytest.raises(BadLimit, match=f"sum in {unit} would be .*, above the 9,000,000"), held[-1]:
        held[-1].settle(one)
    assert not held[-1].open  # its block was left, which gives it back
    with pytest.raises(BadLimit, match=f"sum in {unit} would be .*, above the 9,000,000"):
        budget.child("other").reserve(one)
    assert (budget.state().spent, budget.state().holds) == (state.spent, state.holds - 1)
    held[-2].close(one)  # the answer that it was for goes on
    assert (budget.state().spent, parent.state().spent) == (state.spent, state.spent)
    budget.reserve(nothing).settle(nothing)


def test_a_cost_that_is_too_much_to_add_up_is_booked_as_what_was_held(place: Place) -> None:
    budget, full = place.budget(), Charge(Decimal(FULL))
    for _ in range(2):
        budget.reserve(full).settle(full)
    hold = budget.reserve(Charge(Decimal(1)))
    hold.close(Charge(Decimal(FULL) + 1))
    state = budget.state()
    assert (state.spent["usd"], state.holds, hold.open) == (2 * FULL + 1, 0, False)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("unit", [*LARGEST][:-1])
def test_a_charge_that_waits_and_is_more_than_can_be_counted_blocks_no_reservation(
    place: Place, monkeypatch: pytest.MonkeyPatch, unit: str, full: bool
) -> None:
    most, times = (FULL, 3) if unit == "usd" else (10**15, 9)
    nothing = Charge(Decimal(0), escalations=0)
    one, half, whole = (replace(nothing, **{unit: number}) for number in (1, most // 2, most))
    budget = place.budget(name="run")
    waiting, other = budget.reserve(one), budget.child("agent").reserve(one)
    for at, hold in enumerate([budget.reserve(nothing) for _ in range(times)], 1):
        hold.settle(whole if full or at < times else half)
    before = budget.state().spent[unit]

    def down(*_: object) -> None:
        raise StoreUnavailable("down")

    with monkeypatch.context() as outage:
        outage.setattr(place.store, "settle", down)
        for hold, charge in ((waiting, whole), (other, one)):
            with pytest.raises(StoreUnavailable):
                hold.settle(charge)
    for _ in range(2):
        budget.reserve(nothing).settle(nothing)
    assert budget.state().spent[unit] == before + (0 if full else 2)  # what was held, where that can be counted
    assert budget.state().holds == 0


def test_an_unknown_price_is_refused_anywhere_under_a_dollar_limit(place: Place) -> None:
    run = place.budget(usd=1)
    agent = run.child("agent", escalations=5)
    with pytest.raises(UnpricedModel, match="unknown"):
        agent.reserve(Charge())
    assert run.state().holds == 0
    assert agent.in_dollars


def test_an_unknown_price_elsewhere_makes_the_sum_unknown_never_zero(place: Place) -> None:
    budget = place.budget(escalations=5)
    budget.reserve(cents(1, 1)).settle(cents(1, 1))
    assert budget.state().spent["usd"] == Decimal("0.01")
    budget.reserve(Charge()).settle(Charge())
    assert budget.state().spent["usd"] is None
    assert budget.state().unpriced == 1


def test_an_actual_cost_nobody_knows_is_booked_as_reserved(place: Place) -> None:
    budget = place.budget(usd=1)
    budget.reserve(cents(30, 1)).settle(Charge())
    assert budget.state().spent["usd"] == Decimal("0.3")


def test_nothing_may_be_spent_under_a_limit_of_zero(place: Place) -> None:
    budget = place.budget(usd=0, name="broke")
    with pytest.raises(BudgetExceeded):
        budget.reserve(Charge(Decimal("0.000000000001"), escalations=0))
    budget.reserve(ONE)  # free is free


def test_a_window_starts_afresh_and_never_reopens(place: Place) -> None:
    budget = place.budget(usd=1, window=PER_DAY)
    budget.reserve(cents(60)).settle(cents(60))
    held = budget.reserve(cents(40), ttl_s=200_000)
    place.advance(86_400)
    assert budget.state().spent["usd"] == 0
    assert budget.state().left == {"usd": Decimal("0.6")}  # what is held stays held
    held.settle(cents(40))
    assert budget.state().spent["usd"] == Decimal("0.4")
    place.advance(-86_400)  # the clock is set back
    assert budget.state().spent["usd"] == Decimal("0.4")
    place.advance(2 * 86_400)
    assert budget.state().left == {"usd": 1}


def test_a_window_begins_at_its_offset(place: Place) -> None:
    budget = place.budget(usd=1, window=Window(86_400, offset_s=6 * 3_600))
    budget.reserve(cents(100)).settle(cents(100))  # at eight o'clock
    place.advance(17 * 3_600)  # at one: the day of the calendar is another
    with pytest.raises(BudgetExceeded):
        budget.reserve(cents(100))
    place.advance(6 * 3_600)
    budget.reserve(cents(100))


def test_a_new_window_forgets_overruns_too(place: Place) -> None:
    budget = place.budget(escalations=5, window=PER_DAY)
    budget.reserve(ONE).settle(Charge(Decimal(0), escalations=3))
    assert budget.state().overrun == {"escalations": 2}
    place.advance(86_400)
    assert budget.state().overrun == {}


def test_more_time_after_the_deadline_raises_the_limit_by_what_has_passed_since(place: Place) -> None:
    budget = place.budget(seconds=10)
    place.advance(15)
    budget.extend(seconds=20)
    state = budget.state()
    assert [part["seconds"] for part in (state.limit, state.spent, state.left)] == pytest.approx([35, 15, 20])


def test_copies_are_the_same_meter(place: Place) -> None:
    budget = place.budget(escalations=2)
    for twin in (copy.copy(budget), copy.deepcopy({"state": [budget]})["state"][0]):
        twin.reserve(ONE).settle(ONE)
    assert budget.state().spent["escalations"] == 2


def test_a_shared_budget_pickles_and_a_private_one_says_why_not(place: Place) -> None:
    agent = place.budget(escalations=3, name="run").child("agent", escalations=2, on_exhausted="ask")
    if place.kind == "memory":
        with pytest.raises(TypeError, match="SQLiteStore or RedisStore"):
            pickle.dumps(agent)
        return
    twin: Budget = pickle.loads(pickle.dumps(agent))
    twin.reserve(ONE).settle(ONE)
    assert (twin.path, twin.on_exhausted) == ("run/agent", "ask")
    assert agent.state().spent["escalations"] == 1
    assert twin.parent is not None
    assert twin.parent.state().spent["escalations"] == 1


def test_the_view_of_a_last_answer_pickles_as_one(shared_place: Place) -> None:
    run = shared_place.budget(escalations=1, reserve_for_final=Charge(Decimal(0)))
    plain, last = pickle.loads(pickle.dumps((run, run.final())))
    with pytest.raises(BudgetExceeded):
        plain.reserve(ONE)
    last.reserve(ONE).settle(ONE)
    assert run.state().spent["escalations"] == 1


def test_odd_names_are_names(place: Place) -> None:
    budget = place.budget(escalations=2, name="~{ünï} code:\n'\"")
    child = budget.child("%s -- ; DROP")
    child.reserve(ONE, ttl_s=1)
    place.advance(2)
    child.reserve(ONE).settle(ONE)
    assert budget.state().spent["escalations"] == 1


def test_its_state_is_plain_json(place: Place) -> None:
    budget = place.budget(usd="0.05", escalations=3)
    budget.reserve(cents(2, 1, 40)).settle(cents(1, 1, 40))
    assert budget.state().as_dict() == {
        "limit": {"usd": "0.05", "escalations": 3},
        "held": {"usd": "0", "escalations": 0},
        "spent": {"usd": "0.01", "escalations": 1, "llm_tokens": 40},
        "left": {"usd": "0.04", "escalations": 2},
    }
