"""Any sequence of operations agrees with a simple model, step by step, on every store."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from budget_support import STORES, Place, make_place, redis_server  # noqa: F401
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule, run_state_machine_as_test

from s2t_agents.budget import Budget, Charge, Hold
from s2t_agents.errors import BudgetExceeded, HoldClosed

PATHS = {
    "fleet": None,
    "fleet/run": "fleet",
    "fleet/run/a": "fleet/run",
    "fleet/run/b": "fleet/run",
    "fleet/x": "fleet",
}
UNITS = ("usd", "escalations", "llm_tokens", "answers", "answer_tokens")
PICO = Decimal("0.000000000001")

charges = st.builds(
    Charge,
    usd=st.one_of(st.integers(0, 10**13).map(lambda n: n * PICO), st.sampled_from([Decimal(0), Decimal("2.5")])),
    llm_tokens=st.integers(0, 400),
    escalations=st.integers(0, 3),
    answers=st.integers(0, 1),
    answer_tokens=st.integers(0, 300),
)


def exact(charge: Charge) -> dict[str, Fraction]:
    assert charge.usd is not None
    return {unit: Fraction(getattr(charge, unit)) for unit in UNITS}


@dataclass
class ModelMeter:
    """What a meter means, with nothing clever: lists that are summed every time."""

    limit: dict[str, Fraction]
    keep: dict[str, Fraction]
    deadline: float | None
    settled: list[dict[str, Fraction]] = field(default_factory=list)
    overruns: list[dict[str, Fraction]] = field(default_factory=list)

    def spent(self, unit: str) -> Fraction:
        return sum((cost[unit] for cost in self.settled), Fraction(0))

    def over(self, unit: str) -> Fraction:
        return sum((cost[unit] for cost in self.overruns), Fraction(0))


@dataclass
class ModelHold:
    chain: list[str]
    want: dict[str, Fraction]
    expires: float
    state: str = "open"


class BudgetMachine(RuleBasedStateMachine):
    """Budgets in a tree, and the model beside them."""

    kind = "memory"
    redis_url = ""
    holds = Bundle("holds")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.place: Place = make_place(self.kind, Path(self.folder.name), self.redis_url)
        self.now = 0.0
        self.meters: dict[str, ModelMeter] = {}
        self.budgets: dict[str, Budget] = {}
        self.open: list[ModelHold] = []
        limits: dict[str, dict[str, Any]] = {
            "fleet": {"usd": 20, "escalations": 12, "llm_tokens": 2000, "answer_tokens": 1500},
            "fleet/run": {"usd": "12.5", "escalations": 8, "reserve_for_final": Charge(Decimal(2))},
            "fleet/run/a": {"llm_tokens": 900, "seconds": 50.0},
            "fleet/run/b": {"answers": 3},
            "fleet/x": {"usd": "0.000000000003", "escalations": 1},
        }
        for path, parent in PATHS.items():
            given = limits[path]
            keep = given.get("reserve_for_final") or Charge(Decimal(0), escalations=0)
            self.meters[path] = ModelMeter(
                {unit: Fraction(given[unit]) for unit in UNITS if unit in given}, exact(keep), given.get("seconds")
            )
            name = path.rpartition("/")[2]
            self.budgets[path] = (
                self.budgets[parent].child(name, **given)
                if parent
                else Budget(store=self.place.store, name=name, **given)
            )

    def teardown(self) -> None:
        self.place.store.close()
        self.folder.cleanup()

    def chain(self, path: str) -> list[str]:
        parent = PATHS[path]
        return [*(self.chain(parent) if parent else []), path]

    def held(self, path: str, unit: str) -> Fraction:
        return sum((h.want[unit] for h in self.open if h.state == "open" and path in h.chain), Fraction(0))

    def fits(self, path: str, want: dict[str, Fraction], final: bool) -> bool:
        for link in self.chain(path):
            meter = self.meters[link]
            if meter.deadline is not None and self.now >= meter.deadline:
                return False
            for unit, limit in meter.limit.items():
                kept = 0 if final and link == path else meter.keep[unit]
                if want[unit] and meter.spent(unit) + self.held(link, unit) + want[unit] + kept > limit:
                    return False
        return True

    @rule(
        target=holds,
        path=st.sampled_from(sorted(PATHS)),
        charge=charges,
        final=st.booleans(),
        ttl=st.sampled_from([5.0, 30.0]),
    )
    def reserve(self, path: str, charge: Charge, final: bool, ttl: float) -> tuple[Hold, ModelHold] | None:
        budget = self.budgets[path].final() if final else self.budgets[path]
        want = exact(charge)
        if not self.fits(path, want, final):
            with pytest.raises(BudgetExceeded) as refused:
                budget.reserve(charge, ttl_s=ttl)
            assert refused.value.budget in self.chain(path)
            return None
        model = ModelHold(self.chain(path), want, self.now + ttl)
        hold = budget.reserve(charge, ttl_s=ttl)
        self.open.append(model)
        return hold, model

    @rule(pair=consumes(holds), actual=charges, exactly=st.booleans())
    def settle(self, pair: tuple[Hold, ModelHold] | None, actual: Charge, exactly: bool) -> None:
        if pair is None:
            return
        hold, model = pair
        cost = exact(hold.reserved if exactly else actual)
        reserved = model.want if model.state == "open" else dict.fromkeys(UNITS, Fraction(0))
        for link in model.chain:
            self.meters[link].settled.append(cost)
            self.meters[link].overruns.append({u: max(Fraction(0), cost[u] - reserved[u]) for u in UNITS})
        if model.state == "open":
            hold.settle(hold.reserved if exactly else actual)
        else:
            with pytest.raises(HoldClosed):
                hold.settle(hold.reserved if exactly else actual)
        model.state = "closed"
        with pytest.raises(HoldClosed):
            hold.settle(actual)

    @rule(pair=consumes(holds))
    def release(self, pair: tuple[Hold, ModelHold] | None) -> None:
        if pair is None:
            return
        hold, model = pair
        if model.state == "open":
            hold.release()
        else:
            with pytest.raises(HoldClosed):
                hold.release()
        model.state = "closed"

    @rule(seconds=st.sampled_from([1.0, 6.0, 31.0]))
    def wait(self, seconds: float) -> None:
        self.place.advance(seconds)
        self.now += seconds
        for model in self.open:
            if model.state == "open" and model.expires <= self.now:
                model.state = "lapsed"

    @rule(path=st.sampled_from(["fleet", "fleet/run"]), more=st.integers(1, 3))
    def extend(self, path: str, more: int) -> None:
        self.budgets[path].extend(escalations=more, usd=PICO * more)
        self.meters[path].limit["escalations"] += more
        self.meters[path].limit["usd"] += Fraction(PICO * more)

    @rule()
    def calendar_jumps(self) -> None:
        self.place.clock.date += 10_000_000  # holds and deadlines do not look at the calendar

    @invariant()
    def agrees_with_the_model(self) -> None:
        for path, meter in self.meters.items():
            state = self.budgets[path].state()
            for unit in UNITS:
                assert state.spent.get(unit, 0) == meter.spent(unit)
                assert state.overrun.get(unit, 0) == meter.over(unit)
            for unit, limit in meter.limit.items():
                assert state.held[unit] == self.held(path, unit)
                assert state.limit[unit] == limit
                assert state.left[unit] == max(0, limit - meter.spent(unit) - self.held(path, unit))
            assert state.holds == sum(h.state == "open" and path in h.chain for h in self.open)

    @invariant()
    def settled_and_held_stay_within_the_limit(self) -> None:
        for budget in self.budgets.values():
            state = budget.state()
            for unit, limit in state.limit.items():
                spent = state.spent[unit]
                assert spent is not None
                if unit != "seconds":
                    assert Fraction(spent) - Fraction(state.overrun.get(unit, 0)) + Fraction(state.held[unit]) <= limit
                assert min(spent, state.held[unit], state.left[unit]) >= 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", STORES)
def test_any_sequence_of_operations_agrees_with_the_model(kind: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue("redis_server").url if kind == "redis" else ""
    machine = type(f"{kind}Machine", (BudgetMachine,), {"kind": kind, "redis_url": url})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples={"memory": 150, "sqlite": 25, "redis": 25}[kind],
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
