"""Drift: one warning when trigger or escalation rates leave their calibrated intervals."""

import logging
import random
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from training_fixtures import QUICK, tiny_pair, write_prompts

from s2t_agents import ChatS2T, Escalation, LocalLLM
from s2t_agents.engine.engine import steps_of
from s2t_agents.intervals import wilson
from s2t_agents.scheduling.waits import finish, gather
from s2t_agents.selectors import SelectorConfig
from s2t_agents.selectors.config import BaseIdentity, Calibration
from s2t_agents.selectors.drift import FEWEST, FEWEST_ANSWERS, DriftWatch, LiveRate
from s2t_agents.training.calibrate import calibrate_with
from s2t_agents.training.collect import collect_with
from s2t_agents.training.config import CalibrateConfig, Fit, Targets
from s2t_agents.training.dialogue import Speaker
from s2t_agents.training.objectives import fresh_selector
from s2t_agents.training.tasks import JsonlTask
from s2t_agents.triggers import entropy
from s2t_agents.types import Sampling


def calibration(**changed) -> Calibration:
    found = {
        "trigger_entropy": 0.5, "trigger_rate": 0.2, "trigger_rate_ci95": (0.19, 0.21),
        "escalation_margin": 0.5, "escalation_rate": 0.3, "escalation_rate_ci95": (0.27, 0.33),
        "agreement": 0.5, "agreement_ci95": (0.4, 0.6), "agreement_greedy": 0.4, "problems": 100, "seed": 0,
    }  # fmt: skip
    return Calibration(**{**found, **changed})


def said_by(watch: DriftWatch, answers: int, *counts: int) -> list[str]:
    return [said for _ in range(answers) if (said := watch.see(*counts)) is not None]


def test_a_rate_that_left_its_interval_is_said_once():
    watch = DriftWatch(calibration())
    (said,) = said_by(watch, 100, 100, 50)
    assert "50.0% of 2000 steps were critical" in said
    assert "the calibration expects 19.0% to 21.0%" in said
    assert "s2t calibrate" in said


def test_rates_that_stay_are_not_mentioned():
    assert not said_by(DriftWatch(calibration(), escalations=True), 1000, 100, 20, 6)


def test_a_small_shift_is_not_mentioned():
    assert not said_by(DriftWatch(calibration()), 5000, 100, 24)
    assert not said_by(DriftWatch(calibration()), 5000, 100, 16)
    assert said_by(DriftWatch(calibration()), 5000, 100, 30)
    assert said_by(DriftWatch(calibration()), 5000, 100, 12)


def test_few_answers_or_few_steps_say_nothing():
    assert not said_by(DriftWatch(calibration()), FEWEST_ANSWERS - 1, 10 * FEWEST, 10 * FEWEST)
    assert not said_by(DriftWatch(calibration()), FEWEST - 1, 1, 1)


def test_the_escalation_rate_is_watched_where_the_margin_alone_decides():
    (said,) = said_by(DriftWatch(calibration(), escalations=True), 100, 100, 20, 18)
    assert "90.0% of 400 critical steps were for the LLM" in said
    assert "the calibration expects 27.0% to 33.0%" in said
    assert not said_by(DriftWatch(calibration()), 100, 100, 20, 18)


@pytest.mark.parametrize(("true_rate", "warned"), [(0.2, False), (0.4, True)])
def test_answers_that_differ_among_themselves_are_no_drift(true_rate, warned):
    """Half of the answers are easy, half hard; their mean decides."""
    lots = random.Random(0)
    warnings = 0
    for _ in range(50):
        watch = DriftWatch(calibration())
        for _ in range(200):
            rate = true_rate * lots.choice((0.2, 1.8))
            if watch.see(40, sum(lots.random() < rate for _ in range(40))):
                warnings += 1
    assert warnings == 50 if warned else warnings <= 3


def test_the_live_interval_is_no_narrower_than_for_independent_steps():
    even = LiveRate()
    for _ in range(50):
        even.add(20, 100)
    low, high = even.interval
    assert low < wilson(1000, 5000)[0] < 0.2 < wilson(1000, 5000)[1] < high


def test_many_threads_hear_one_warning():
    watch = DriftWatch(calibration())
    with ThreadPoolExecutor(8) as pool:
        said = [text for text in pool.map(lambda _: watch.see(100, 50), range(400)) if text]
    assert len(said) == 1


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny model with a calibrated head: its own prompts are calm, and it says so on others."""
    folder = tmp_path_factory.mktemp("drift")
    slm, llm, teacher = tiny_pair()
    task = JsonlTask(write_prompts(folder / "heldout.jsonl", 60, first=100), "numeric")
    collect_with(
        slm, teacher, task, QUICK.model_copy(update={"max_tokens": 30, "shard_items": 60}), folder / "rollouts"
    )
    selector = fresh_selector(slm, "head", Fit(width=8))
    selector.save(folder / "head", SelectorConfig(kind="head", base=BaseIdentity.of(slm), k=4))
    targets = Targets(trigger_rate=0.2, escalation_rate=0.5)
    calibrate_with(slm, CalibrateConfig(selector=folder / "head", rollouts=folder / "rollouts", targets=targets))
    return slm, llm, folder / "head"


def with_rate(folder, tmp_path, rate: float):
    """The same selector, its calibration as if it had seen another trigger rate."""
    config = SelectorConfig.load(folder)
    told = config.calibration.model_copy(update={"trigger_rate": rate, "trigger_rate_ci95": (rate - 0.01, rate + 0.01)})
    config.model_copy(update={"calibration": told}).save(tmp_path / "head")
    for file in folder.glob("*.safetensors"):
        (tmp_path / "head" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "head"


def warnings_of(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.name == "s2t_agents.selectors.drift"]


def answers(model: ChatS2T, count: int = 45) -> None:
    """Drained from the engine, as rollouts are: a grammar over random bytes would be a drift of its own."""
    encode = Speaker(model.engine.slm).encode
    for at in range(count):
        prompt = encode([{"role": "user", "content": f"{100 + at} + {at}?"}], ())
        list(model.engine.steps(prompt, Sampling(max_tokens=30)))


def test_a_model_warns_once_of_prompts_that_it_was_not_calibrated_on(made, tmp_path, caplog):
    slm, _, folder = made
    model = ChatS2T(model=slm, selector=with_rate(folder, tmp_path, 0.9), max_tokens=30)
    with caplog.at_level(logging.WARNING):
        answers(model)
        answers(model.model_copy(), 3)
    (said,) = warnings_of(caplog)
    assert "expects 89.0% to 91.0%" in said


def test_a_model_on_prompts_like_those_of_its_calibration_is_silent(made, caplog):
    slm, llm, folder = made
    model = ChatS2T(model=slm, selector=folder, escalation=LocalLLM(llm), max_tokens=30)
    with caplog.at_level(logging.WARNING):
        answers(model)
    assert model.engine.drift is not None
    assert model.engine.drift.trigger_rate.steps > FEWEST
    assert model.engine.drift.escalation_rate.hits > 0
    assert not warnings_of(caplog)


def test_a_trigger_of_ones_own_is_not_watched(made, tmp_path):
    slm, _, folder = made
    assert ChatS2T(model=slm, selector=folder, trigger=entropy(above=0.1)).engine.drift is None
    assert ChatS2T(model=slm).engine.drift is None


def test_a_margin_of_ones_own_is_not_watched(made):
    slm, llm, folder = made
    by_hand = ChatS2T(model=slm, selector=folder, escalation=Escalation(LocalLLM(llm), margin=0.1))
    assert not by_hand.engine.drift.watches_escalations


def test_an_answer_that_is_left_counts_too(made):
    slm, _, folder = made
    model = ChatS2T(model=slm, selector=folder, max_tokens=30)
    stream = model.stream("1 + 1?")
    next(stream)
    stream.close()
    assert 1 <= model.engine.drift.trigger_rate.steps < 30


def test_steps_count_the_same_whichever_driver_asks_for_them(made):
    slm, _, folder = made
    engine, few = ChatS2T(model=slm, selector=folder).engine, Sampling(max_tokens=30)
    prompts = [[65, 66, 67], [70, 71], [72]]
    drivers = [
        lambda: [list(engine.steps(prompt, few)) for prompt in prompts],
        lambda: [list(engine.run(prompt, few)) for prompt in prompts],
        lambda: [finish(steps_of(engine.generation(prompt, few))) for prompt in prompts],
        lambda: gather([steps_of(engine.generation(prompt, few)) for prompt in prompts]),
    ]
    seen = [(0, 0, 0)]
    for drain in drivers:
        drain()
        rate = engine.drift.trigger_rate
        seen.append((rate.answers, rate.steps, rate.hits))
    counted = {tuple(now - was for was, now in zip(before, after, strict=True)) for before, after in pairwise(seen)}
    assert len(counted) == 1
    assert counted.pop()[:2] == (3, 90)


def test_watching_changes_no_step(made):
    slm, _, folder = made
    engine, few = ChatS2T(model=slm, selector=folder).engine, Sampling(max_tokens=100)
    with torch.no_grad():
        watched = [step.token_id for step in engine.steps([65, 66, 67], few)]
        engine.drift = None
        assert [step.token_id for step in engine.steps([65, 66, 67], few)] == watched
