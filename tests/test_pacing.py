"""Pacing spends what is left of a budget where the selector is least sure, over the whole run."""

import itertools
import math
import pickle
import random
from collections.abc import Sequence
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.pacing_simulation import simulate
from s2t_agents import Budget, ChatS2T, Ledger, TokenPrice
from s2t_agents.budget import Charge
from s2t_agents.errors import ConfigError, InputError
from s2t_agents.escalation import Escalation, Pace, Pacing, margins_of
from s2t_agents.ledger import GenerationRecord, Receipt, ReceiptCandidate
from s2t_agents.llms.question import Answer, Question
from s2t_agents.testing import ScriptedLLM, last_candidate, tiny_model
from s2t_agents.triggers import always, entropy


def drawn(shape: str, n: int, seed: int) -> list[float]:
    rng = random.Random(seed)
    shapes = {
        "even": rng.random,
        "mostly sure": lambda: rng.betavariate(4, 1),
        "mostly unsure": lambda: rng.betavariate(1, 4),
        "two kinds": lambda: rng.choice([rng.uniform(0, 0.2), rng.uniform(0.8, 1)]),
    }
    return [shapes[shape]() for _ in range(n)]


SHAPES = ["even", "mostly sure", "mostly unsure", "two kinds"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("escalations", [10, 30, 100])
def test_it_reaches_most_of_the_optimum_where_first_come_does_not(shape: str, escalations: int) -> None:
    runs = [simulate(drawn(shape, 300, seed), escalations) for seed in range(20)]
    paced = sum(run.share_paced for run in runs) / len(runs)
    first_come = sum(run.share_first_come for run in runs) / len(runs)
    assert paced > 0.93
    assert paced > first_come + 0.3 * (1 - first_come)


def test_margins_known_from_before_help_a_short_run() -> None:
    shape, known = "mostly sure", drawn("mostly sure", 500, seed=99)
    runs = [(simulate(drawn(shape, 40, s), 4), simulate(drawn(shape, 40, s), 4, known=known)) for s in range(60)]
    assert sum(known.paced for _, known in runs) > sum(blank.paced for blank, _ in runs)


@pytest.mark.parametrize("expected", [100, 450])
def test_a_wrong_guess_of_the_runs_length_still_beats_first_come(expected: int) -> None:
    runs = [simulate(drawn("even", 300, seed), 30, expected=expected) for seed in range(20)]
    assert sum(run.paced for run in runs) > sum(run.first_come for run in runs)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=80), st.integers(0, 90), st.floats(0, 1))
def test_no_way_to_spend_beats_hindsight_and_none_overspends(margins: list[float], n: int, at_most: float) -> None:
    result = simulate(margins, n, at_most=at_most)
    assert result.first_come <= result.optimum + 1e-9
    assert result.paced <= result.optimum + 1e-9
    if n >= len(margins):  # money for all: everything unsure goes up
        assert result.paced == pytest.approx(result.optimum)


def test_the_gains_may_be_others_than_the_margins_say() -> None:
    result = simulate([0.1, 0.9, 0.2, 0.8], 2, gains=[1, 0, 1, 0])
    assert (result.optimum, result.first_come) == (2, 1)
    assert simulate([], 3).share_paced == 1.0


def test_the_bar_falls_as_the_budget_runs_out_and_rises_as_it_is_left_over() -> None:
    def bar(left: int, *, after: int) -> float:
        """The lowest margin, in hundredths, that is not escalated with so many questions left, after so many of 0.5."""
        for hundredths in range(101):
            pace = Pace(100, [i / 100 for i in range(100)])
            for _ in range(after):
                pace.decide(0.5, 20)
            if not pace.decide(hundredths / 100, left, at_most=math.inf):
                return hundredths / 100
        return math.inf

    assert [bar(left, after=0) for left in (5, 20, 50)] == pytest.approx([0.05, 0.2, 0.5], abs=0.011)
    assert bar(20, after=60) > bar(5, after=60)
    assert bar(20, after=60) == pytest.approx(0.5, abs=0.02)  # 20 of the 40 to come
    assert bar(40, after=60) == math.inf


def test_the_bar_lies_between_two_margins_where_a_part_of_a_question_is_left_over() -> None:
    known = (0.2, 0.4, 0.6, 0.8)  # three of eight to come can be paid for: the bar is in the middle, at 0.3
    assert Pace(8, known).decide(0.29, 3.0)
    assert not Pace(8, known).decide(0.31, 3.0)


def test_with_nothing_left_it_leaves_the_refusal_to_the_budget() -> None:
    pace = Pace(100)
    assert pace.decide(0.5, 0, at_most=0.9)  # so that the answer is marked degraded
    assert not pace.decide(0.95, 0, at_most=0.9)


def test_what_can_be_afforded_is_the_scarcest_unit_at_the_mean_cost_so_far() -> None:
    pace = Pace(100)
    budget = Budget(usd="1", escalations=50, llm_tokens=10_000)
    assert pace.affordable(budget) == 50
    for tokens in (300, 500):
        pace.add_charge(Charge(Decimal("0.01"), tokens))
    assert pace.affordable(budget) == 25  # 10,000 / 400
    assert pace.affordable(Budget(usd="0.05")) == pytest.approx(5)
    assert pace.affordable(Budget()) == math.inf


def test_a_run_has_one_pace_whichever_agent_asks_and_another_run_another() -> None:
    pacing, run = Pacing(100), Budget(escalations=5)
    assert pacing.pace_for(run) is pacing.pace_for(run.child("critic"))
    assert pacing.pace_for(run) is pacing.pace_for(run.view(on_exhausted="raise"))
    assert pacing.pace_for(run) is pacing.pace_for(run.final().child("critic"))
    assert pacing.pace_for(run) is not pacing.pace_for(Budget(escalations=5))
    assert pickle.loads(pickle.dumps(pacing)) == pacing


@pytest.mark.parametrize("bad", [{"selections": 0}, {"selections": 5, "margins": (1.5,)}])
def test_settings_that_can_not_work_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="pacing"):
        Pacing(**bad)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- in an answer


def recorded(model: ChatS2T, prompts: Sequence[str]) -> list[GenerationRecord]:
    model.batch(list(prompts), {"max_concurrency": 1})
    assert model.ledger is not None
    return model.ledger.records()


def test_a_paced_answer_spends_on_its_least_sure_steps() -> None:
    slm, prompt = tiny_model(), ["hello there"]

    def margins(escalation: Escalation, limit: int) -> list[float]:
        model = ChatS2T(
            model=slm,
            k=4,
            max_tokens=60,
            trigger=always(),
            escalation=escalation,
            budget=Budget(escalations=limit),
            ledger=Ledger(),
        )
        picked = [r for record in recorded(model, prompt) for r in record.receipts if r.outcome == "picked"]
        assert len(picked) <= limit
        return margins_of([GenerationRecord(receipts=tuple(picked))])

    def agreeing(ids: Sequence[int], candidates: Sequence[int]) -> list[float]:
        return [-float(at) for at in range(len(candidates))]

    first_come = margins(Escalation(ScriptedLLM(agreeing), margin=1.0), 10)
    paced = margins(Escalation(ScriptedLLM(agreeing), margin=1.0, pacing=Pacing(60)), 10)
    assert len(paced) >= 7
    assert sum(paced) / len(paced) < sum(first_come) / len(first_come)


def test_a_dollar_budget_is_paced_too() -> None:
    price = TokenPrice(Decimal(1), Decimal(1))
    llm = ScriptedLLM(last_candidate, price=price)
    model = ChatS2T(
        model=tiny_model(),
        max_tokens=60,
        trigger=always(),
        escalation=Escalation(llm, margin=1.0, pacing=Pacing(60)),
        budget=Budget(usd="0.0006"),
    )
    model.invoke("hello")
    asked = [len(ids) for ids, _ in llm.asked]
    assert 5 <= len(asked) < 30
    assert asked[-1] - asked[0] > 2 * len(asked)  # spread over the answer, not one after the other


def test_the_next_questions_are_expected_to_cost_what_the_last_ones_did_not_what_was_held_for_them() -> None:
    class Cheaper(ScriptedLLM):
        def ask(self, question: Question) -> Answer:
            answer = super().ask(question)
            question.owe(Charge(Decimal("0.001"), 10))
            return answer

    pacing, budget = Pacing(60), Budget(usd=1)
    escalation = Escalation(
        Cheaper(last_candidate, price=TokenPrice(Decimal(1000), Decimal(1000))), margin=1.0, pacing=pacing
    )
    settings = {"model": tiny_model(), "trigger": always(), "escalation": escalation, "budget": budget}
    answer = ChatS2T(**settings, max_tokens=1).invoke("hello")
    assert answer.response_metadata["s2t"]["escalations"] == 1
    assert pacing.pace_for(budget).affordable(budget) == pytest.approx(999)


def test_receipts_without_scores_have_no_margin() -> None:
    bare = Receipt(step=0, prefix_tokens=1, candidates=(ReceiptCandidate(token_id=1),), outcome="failed")
    with pytest.raises(InputError, match="no local scores"):
        margins_of([GenerationRecord(receipts=(bare,))])


def test_on_receipts_of_the_bundled_pair_it_reaches_most_of_the_optimum() -> None:
    from s2t_agents.demo.world import generate

    refused = Budget(escalations=0)  # every unsure step leaves a receipt with its margin, and costs nothing
    model = ChatS2T(
        max_tokens=96,
        trigger=entropy(above=0.02),
        escalation=Escalation(ScriptedLLM(last_candidate), margin=1.0),
        budget=refused,
        ledger=Ledger(),
    )
    margins = margins_of(recorded(model, [generate(seed, "heldout", "word").question for seed in range(40)]))
    assert len(margins) > 30
    n = len(margins) // 5
    orders = [margins, *(random.Random(seed).sample(margins, len(margins)) for seed in range(20))]
    results = [simulate(order, n) for order in orders]
    paced, first_come = (sum(r.share_paced for r in results), sum(r.share_first_come for r in results))
    assert paced / len(results) > 0.85
    assert paced > first_come
    assert all(r.optimum == pytest.approx(results[0].optimum) for r in itertools.islice(results, 3))
