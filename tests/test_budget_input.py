"""Bad input gets one clear error: the value, what is wrong with it, the way out."""

from __future__ import annotations

import copy
import pickle
from decimal import Decimal, localcontext
from typing import Any

import pytest
from budget_support import CONTEXTS
from pydantic import ValidationError

from s2t_agents.budget import Budget, Charge, DevicePrice, MemoryStore, SystemClock, TokenPrice, Window
from s2t_agents.budget.extension import extension_from
from s2t_agents.budget.names import meter_name
from s2t_agents.budget.refusals import refusal_question
from s2t_agents.errors import BadLimit, BudgetExceeded, ConfigError, S2TError
from s2t_agents.ledger import Receipt

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"usd": -1}, "usd=-1 is below 0"),
        ({"usd": "-0.5"}, "below 0"),
        ({"usd": NAN}, "must be finite"),
        ({"usd": INF}, "must be finite"),
        ({"usd": Decimal("sNaN")}, "must be finite"),
        ({"usd": "5 EUR"}, "5 EUR.*Only US dollars"),
        ({"usd": "€5"}, "Only US dollars"),
        ({"usd": "$5"}, "plain number"),
        ({"usd": ""}, "plain number"),
        ({"usd": True}, "not an amount of dollars"),
        ({"usd": [5]}, "not an amount of dollars"),
        ({"usd": 0.1 + 0.2}, "finer than.*Round it: 0.3 would do"),
        ({"usd": "0.0000000000001"}, "finer than"),
        ({"usd": 1e30}, "above 1,000,000 USD"),
        ({"escalations": -1}, "escalations=-1 is below 0"),
        ({"escalations": 1.5}, "not a whole number"),
        ({"escalations": True}, "not a whole number"),
        ({"escalations": 10**20}, "above"),
        ({"llm_tokens": NAN}, "not a whole number"),
        ({"llm_tokens": "many"}, "not a whole number"),
        ({"seconds": -1}, "seconds=-1 must be from 0"),
        ({"seconds": NAN}, "must be from 0"),
        ({"seconds": INF}, "must be from 0"),
        ({"seconds": True}, "not a number of seconds"),
        ({"seconds": "soon"}, "not a number of seconds"),
        ({"seconds": 5, "window": Window(60)}, "cannot start afresh"),
        ({"window": "day"}, "not a Window"),
        ({"reserve_for_final": 3}, "3 is not a Charge"),
        ({"reserve_for_final": Charge(Decimal(0))}, "keeps back more escalations"),
        ({"escalations": 1, "reserve_for_final": Charge(Decimal(0), escalations=2)}, "keeps back more escalations"),
    ],
)
def test_limits_that_can_not_be_meant(limits: dict[str, Any], says: str) -> None:
    for make in (Budget, lambda **given: Budget().child("agent", **given)):
        with pytest.raises(BadLimit, match=says) as refused:
            make(**limits)
        assert refused.value.hint


def test_zero_is_a_limit() -> None:
    budget = Budget(usd=0, escalations=0, llm_tokens=0, seconds=0)
    with pytest.raises(BudgetExceeded):
        budget.reserve(Charge(Decimal(0), escalations=0))  # its time is over at once
    for limit in ({"escalations": 0}, {"llm_tokens": 0}, {"usd": 0}):
        with pytest.raises(BudgetExceeded):
            Budget(**limit).reserve(Charge(Decimal("0.1"), 1))


@pytest.mark.parametrize("usd", ["0.05", 0.05, Decimal("0.05"), "5e-2"])
def test_a_limit_means_what_it_prints_as(usd: Any) -> None:
    assert Budget(usd=usd).state().limit == {"usd": Decimal("0.05")}


def test_a_charge_is_one_escalation_unless_it_says_otherwise() -> None:
    budget = Budget(escalations=5)
    budget.reserve(Charge(Decimal("0.25"), 7)).settle(Charge(Decimal("0.25"), 7))
    budget.reserve(Charge(llm_tokens=1, escalations=2)).settle(Charge(0.5, 1, 2))  # type: ignore[arg-type]
    assert budget.state().spent == {"usd": Decimal("0.75"), "escalations": 3, "llm_tokens": 8}


BAD_CHARGES: list[Any] = [
    *(Charge(Decimal("-0.1")), Charge(NAN), Charge(INF), Charge("5 EUR"), Charge(True)),  # type: ignore[arg-type]
    *(Charge(Decimal(text)) for text in ("1E+7", "1E+999986", "1E+999999", "9E+999999999999", "4611686.018427387905")),
    *(Charge(Decimal(10**12)), Charge(llm_tokens=-1), Charge(llm_tokens=10**16), Charge(llm_tokens=0.5)),  # type: ignore[arg-type]
    *(Charge(escalations=-1), Charge(escalations=True), Charge(llm_tokens="7"), None, 3, {"usd": 1}),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("bad", BAD_CHARGES, ids=repr)
def test_a_charge_that_no_budget_can_count_is_refused_and_nothing_is_held_or_spent(bad: Any) -> None:
    budget = Budget()
    with pytest.raises(BadLimit) as refused:
        budget.reserve(bad)
    assert refused.value.hint
    with pytest.raises(BadLimit), budget.reserve(Charge(Decimal(1), 10)) as hold:
        hold.settle(bad)
    assert (budget.state().holds, budget.state().spent["escalations"]) == (0, 0)
    if isinstance(bad, Charge):
        with pytest.raises(ValidationError):
            Receipt(step=0, prefix_tokens=1, outcome="failed", actual=bad)


@pytest.mark.parametrize("usd", ["1E-13", "1E-999", "1E-999999", "1E-999999999999", "9E-1999999999999999997"])
def test_a_fraction_of_a_pico_dollar_counts_as_one(usd: str) -> None:
    budget = Budget(usd=1)
    budget.reserve(Charge(Decimal(usd))).settle(Charge(Decimal(usd)))
    assert budget.state().spent["usd"] == Decimal("1E-12")


@pytest.mark.parametrize("usd", ["1000001", "1E+999999", "1E+999999999999"])
def test_a_price_is_a_million_at_most(usd: str) -> None:
    for make in (
        lambda: TokenPrice(Decimal(usd), Decimal(1)),
        lambda: TokenPrice(Decimal(1), Decimal(1), Decimal(usd)),
        lambda: DevicePrice(Decimal(usd)),
    ):
        with pytest.raises(BadLimit, match="above 1,000,000 USD"):
            make()


@pytest.mark.parametrize("offset_s", [5 * 10**9 + 1, 2**62, -(2**70), 10**400])
def test_a_window_that_no_store_can_count_is_refused(offset_s: int) -> None:
    with pytest.raises(BadLimit, match="offset_s=.* is not from -5,000,000,000 to 5,000,000,000"):
        Window(60, offset_s=offset_s)
    with pytest.raises(BadLimit, match="1 to 1,000,000,000"):
        Window(abs(offset_s))


def test_a_hold_that_was_given_no_charge_is_still_open() -> None:
    budget = Budget(usd=1)
    with budget.reserve(Charge(Decimal("0.5"))) as hold:
        with pytest.raises(BadLimit):
            hold.settle(Charge(Decimal(-1)))
        hold.settle(Charge(Decimal("0.1")))
    assert budget.state().spent["usd"] == Decimal("0.1")


@pytest.mark.parametrize("name", CONTEXTS)
def test_charges_add_exactly_whatever_the_callers_decimal_context(name: str) -> None:
    budget = Budget()
    with localcontext(CONTEXTS[name]):
        for _ in range(10):
            budget.reserve(Charge(Decimal("0.1001"), 10)).settle(Charge(Decimal("0.1001"), 10))
        assert budget.state().spent == {"usd": Decimal("1.001"), "escalations": 10, "llm_tokens": 100}


@pytest.mark.parametrize("ttl", [0, -1, NAN, INF, True])
def test_a_hold_needs_a_time_to_live(ttl: float) -> None:
    with pytest.raises(BadLimit, match="ttl_s"):
        Budget().reserve(Charge(escalations=0), ttl_s=ttl)


@pytest.mark.parametrize("name", ["", "a/b", "nul\0", "x" * 201, None, 3])
def test_names(name: Any) -> None:
    with pytest.raises(ConfigError, match="name"):
        Budget(name=name)


def test_a_name_that_no_store_can_hold() -> None:
    with pytest.raises(ConfigError, match="name"):
        Budget(name="x\ud800")
    for identifier in ("thread \ud800", "\ud800" * 300):
        assert Budget().child(meter_name(identifier)).path.encode()
    assert meter_name("\ud800") != meter_name("\ud801")


def test_other_settings() -> None:
    with pytest.raises(ConfigError, match="on_exhausted"):
        Budget(on_exhausted="explode")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="own clock"):
        Budget(store=MemoryStore(), clock=SystemClock())
    with pytest.raises(BadLimit, match="euros: no such limit"):
        Budget().child("a", euros=5)  # type: ignore[call-arg]
    with pytest.raises(BadLimit, match="Window"):
        Window(0)


def test_children_inherit_what_happens_on_exhaustion() -> None:
    run = Budget(on_exhausted="ask")
    assert run.child("a").on_exhausted == "ask"
    assert run.child("b", on_exhausted="raise").on_exhausted == "raise"


@pytest.mark.parametrize(
    "answer", [False, None, 0, 0.0, "", " ", "0", "0.00", "no", "N", "Nope.", "none", "never", "No, 3 is it"]
)
def test_a_no_is_a_no(answer: Any) -> None:
    assert extension_from(answer, "usd") == {}


@pytest.mark.parametrize(
    ("answer", "unit", "more"),
    [
        ("0.05", "usd", Decimal("0.05")),
        ("0.05 more", "usd", Decimal("0.05")),
        ("$0.05", "usd", Decimal("0.05")),
        ("Now 3 more", "escalations", 3),
        ("nine: 9.", "escalations", 9),
        ("yes,3", "escalations", 3),
        ("+3", "escalations", 3),
        ("1,000", "llm_tokens", 1000),
        ("1,234,567.00", "llm_tokens", 1_234_567),
        ("30s", "seconds", 30.0),
        (2.0, "escalations", 2),
        (0.5, "usd", 0.5),
        ({"escalations": 3, "usd": None}, "usd", None),
    ],
)
def test_a_yes_says_how_much(answer: Any, unit: str, more: Any) -> None:
    assert extension_from(answer, unit) == ({"escalations": 3} if more is None else {unit: more})


@pytest.mark.parametrize(
    "answer",
    [
        True,
        "yes",
        "-3",
        "-$3",
        "\N{MINUS SIGN}3",
        "3 or 5",
        "3-5",
        "1,5",
        "1,00",
        "0,05",
        ".05",
        "1e3",
        "10k",
        "5%",
        "5 cents more",
        "€5",
        "5 EUR",
        "2 minutes",
        "10 thousand",
        "now",
        NAN,
        INF,
        "²",
        [3],
    ],
)
def test_an_answer_that_may_mean_something_else_is_refused(answer: Any) -> None:
    for unit in ("escalations", "usd"):
        with pytest.raises(BadLimit, match="does not say how many more") as refused:
            extension_from(answer, unit)
        assert refused.value.hint


def refusal(limits: dict[str, Any], wanted: Charge, on_exhausted: Any = "degrade") -> BudgetExceeded:
    with pytest.raises(BudgetExceeded) as caught:
        Budget(**limits, on_exhausted=on_exhausted).reserve(wanted)
    return caught.value


@pytest.mark.parametrize(
    ("limits", "wanted", "says", "asks"),
    [
        ({"escalations": 0}, Charge(Decimal(0)), "cannot hold 1 escalation: limit 0,", "0 of 0 escalations. "),
        (
            {"escalations": 1},
            Charge(Decimal(0), escalations=2),
            "hold 2 escalations:",
            "0 of 1 escalation and now wants 2. ",
        ),
        (
            {"usd": "0.0000001"},
            Charge(Decimal("0.0000002"), escalations=0),
            "hold 0.0000002 USD: limit 0.0000001,",
            "wants 0.0000002. ",
        ),
        ({"llm_tokens": 0}, Charge(Decimal(0), 9, escalations=0), "hold 9 LLM tokens:", "0 of 0 LLM tokens. "),
        ({"seconds": 0}, Charge(Decimal(0), escalations=0), "its 0 seconds are over", "used up its 0 seconds. "),
    ],
)
def test_a_refusal_reads_like_a_sentence_and_so_does_its_question(
    limits: dict[str, Any], wanted: Charge, says: str, asks: str
) -> None:
    refused = refusal(limits, wanted)
    assert says in str(refused)
    assert refusal_question(refused).startswith("The budget 'run' has used ")
    assert refusal_question(refused).endswith(f"{asks}Allow more?")


@pytest.mark.parametrize(
    ("on_exhausted", "way_out"),
    [("degrade", "extend(escalations=...)"), ("raise", 'on_exhausted="degrade"'), ("ask", "BudgetMiddleware")],
)
def test_a_refusal_names_the_way_out_of_its_own_setting(on_exhausted: Any, way_out: str) -> None:
    refused = refusal({"escalations": 0}, Charge(Decimal(0)), on_exhausted)
    assert way_out in refused.hint
    assert refused.hint in str(refused)


def test_a_refusal_pickles_and_copies_whole() -> None:
    with pytest.raises(BudgetExceeded) as caught:
        Budget(escalations=0).reserve(Charge(Decimal(0)))
    error = caught.value
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is BudgetExceeded
        assert str(twin) == str(error)
        assert vars(twin) == vars(error)
        assert isinstance(twin, S2TError)
