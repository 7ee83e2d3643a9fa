"""Thresholds meet their target rates on held-out rollouts, and say how sure they are."""

import json
import shutil

import pytest
import torch
from training_fixtures import QUICK, prompts, tiny_pair

from s2t_agents.errors import ConfigError
from s2t_agents.intervals import wilson
from s2t_agents.selectors import SelectorConfig, calibrated_trigger, load_selector
from s2t_agents.selectors.config import BaseIdentity
from s2t_agents.selectors.learned_trigger import save_probe
from s2t_agents.training.calibrate import calibrate_with, least_caution, margin_for
from s2t_agents.training.collect import collect_with
from s2t_agents.training.config import CalibrateConfig, Fit, Targets
from s2t_agents.training.groups import threshold_for
from s2t_agents.training.objectives import fresh_selector
from s2t_agents.training.shards import read_shards
from s2t_agents.training.statistics import best_temperature, reliability, roc_auc
from s2t_agents.triggers import entropy, probe


@pytest.fixture(scope="module")
def pair():
    return tiny_pair()


@pytest.fixture(scope="module")
def heldout(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("heldout")
    slm, _, teacher = pair
    collect_with(slm, teacher, prompts(folder, 24, first=500), QUICK, folder / "rollouts")
    with_max_tokens(folder / "rollouts", QUICK.max_tokens + 1)  # as if no answer had run into it
    return folder / "rollouts"


def with_max_tokens(rollouts, max_tokens):
    manifest = json.loads((rollouts / "manifest.json").read_text())
    manifest["settings"]["max_tokens"] = max_tokens
    (rollouts / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def selector(pair, tmp_path):
    slm, _, _ = pair
    made = fresh_selector(slm, "head", Fit(width=16))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made.out.weight.data.normal_(0, 0.5)
    made.save(tmp_path / "head", SelectorConfig(kind="head", base=BaseIdentity.of(slm), k=4))
    return tmp_path / "head"


def calibrated(pair, selector, heldout, **targets):
    config = CalibrateConfig(selector=selector, rollouts=heldout, targets=Targets(**targets), seed=500)
    return calibrate_with(pair[0], config)


def test_answers_that_ran_into_max_tokens_are_left_out(pair, selector, heldout, tmp_path):
    lengths = sorted({len(ids) for shard in read_shards(heldout) for _, ids, _ in shard.trajectories()})
    cut = lengths[-1]
    shutil.copytree(heldout, tmp_path / "cut")
    assert calibrated(pair, selector, heldout, trigger_rate=0.2).problems == 24
    with_max_tokens(tmp_path / "cut", cut)
    short = [
        (int(item), shard.entropy[steps])
        for shard in read_shards(heldout)
        for item, (_, ids, steps) in zip(shard.item, shard.trajectories(), strict=True)
        if len(ids) < cut
    ]
    found = calibrated(pair, selector, tmp_path / "cut", trigger_rate=0.2)
    assert found.problems == (len({item for item, _ in short}) or 24)
    if short:
        assert found.trigger_entropy == pytest.approx(
            max(0.0, threshold_for(torch.cat([entropy for _, entropy in short]), 0.2))
        )


def test_thresholds_meet_the_target_rates(pair, selector, heldout):
    found = calibrated(pair, selector, heldout, trigger_rate=0.2, escalation_rate=0.3)
    steps = sum(len(shard.ids) for shard in read_shards(heldout))
    assert found.trigger_rate == pytest.approx(0.2, abs=1 / steps)
    assert found.escalation_rate == pytest.approx(0.3, abs=2 / (0.2 * steps))
    assert found.trigger_rate_ci95[0] < found.trigger_rate < found.trigger_rate_ci95[1]
    assert (found.problems, found.seed) == (24, 500)
    assert 0 <= found.agreement_greedy <= 1
    assert sum(count for *_, count in found.reliability) == round(found.trigger_rate * steps)


def quiet_answers(scores, llm, sizes):
    """Changed, and all, of the answers in which the LLM wants the SLM's own token at every critical step."""
    parts = zip(scores.split(sizes), llm.split(sizes), strict=True)
    quiet = [one for one, other in parts if len(one) and bool((other.argmax(-1) == 0).all())]
    return sum(bool((part.argmax(-1) != 0).any()) for part in quiet), len(quiet)


def test_caution_keeps_answers_with_nothing_to_fix_as_they_are(pair, selector, heldout):
    wild, _ = load_selector(selector, pair[0])
    wild.out.weight.data.mul_(100)  # changes its mind about most tokens
    wild.save(selector, SelectorConfig.load(selector))
    eager = calibrated(pair, selector, heldout, trigger_rate=0.05)
    careful = calibrated(pair, selector, heldout, trigger_rate=0.05, false_alarms=0.01)
    assert eager.false_alarms > 0.01 >= careful.false_alarms
    loaded, config = load_selector(selector, pair[0])
    assert loaded.caution == config.caution > 0
    raw = torch.zeros(2, 3)
    assert loaded.calibrated(raw, raw)[:, 0].tolist() == pytest.approx([config.caution / config.temperature] * 2)


def test_caution_is_the_least_that_does():
    raw = torch.tensor([[0.0, 3.0], [0.0, 1.0], [0.0, 2.0], [0.0, 5.0]])  # leads of 3, 1, 2 and 5 nats
    llm = torch.tensor([[0.0, -1.0], [0.0, -1.0], [0.0, -1.0], [-1.0, 0.0]])  # the last one is right to flip
    sizes = torch.tensor([1, 2, 1])  # answers; the third has something to fix
    for target, lead in ((0.5, 2.0), (0.99, 2.0), (0.1, 3.0)):
        found = least_caution(raw, llm, sizes, target)
        assert found == pytest.approx(lead, rel=1e-3)
        cautious = torch.cat([raw[:, :1] + found, raw[:, 1:]], 1)
        changed, quiet = quiet_answers(cautious, llm, sizes.tolist())
        assert changed <= target * quiet
    assert least_caution(raw, llm, sizes, None) == 0.0


def test_the_selector_as_loaded_has_them(pair, selector, heldout):
    found = calibrated(pair, selector, heldout)
    loaded, config = load_selector(selector, pair[0])
    assert config.calibration == found
    assert loaded.temperature == config.temperature != 1.0
    assert "held-out problems | 24 (seed 500)" in (selector / "README.md").read_text()
    assert isinstance(calibrated_trigger(selector, config), entropy)


def test_calibrating_twice_changes_nothing(pair, selector, heldout):
    calibrated(pair, selector, heldout)
    once = (selector / "selector.json").read_bytes()
    calibrated(pair, selector, heldout)
    assert (selector / "selector.json").read_bytes() == once


def test_thresholds_for_other_rates_are_written_down(pair, selector, heldout):
    found = calibrated(pair, selector, heldout)
    nats = [found.entropy_for(rate) for rate in (0.01, 0.05, 0.08, 0.1, 0.5)]
    assert nats == sorted(nats, reverse=True)
    assert found.entropy_for(0.05) == pytest.approx(found.trigger_entropy)
    steps = torch.cat([shard.entropy for shard in read_shards(heldout)])
    assert float((steps >= found.entropy_for(0.1)).float().mean()) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("steps", [5, 10, 100])
@pytest.mark.parametrize("rate", [0.2, 0.4, 0.8])
def test_a_margin_lets_through_the_share_that_was_asked_for(steps, rate):
    sure = torch.rand(steps, generator=torch.Generator().manual_seed(steps))
    assert float((sure < margin_for(sure, rate)).float().mean()) == pytest.approx(rate)


def test_a_margin_among_equals_lets_fewer_through_than_planned():
    assert margin_for(torch.full((10,), 0.5), 0.3) == 0.5
    assert margin_for(torch.rand(3), 0.99) == 1.0
    assert float((torch.tensor([0.3, 0.6]) < margin_for(torch.tensor([0.3, 0.6]), 0.1)).sum()) == 0


def test_a_threshold_among_equals_gives_the_nearest_rate():
    values = torch.cat([torch.zeros(60), torch.linspace(0.1, 1, 40)])
    assert float((values >= threshold_for(values, 0.5)).float().mean()) == pytest.approx(0.4)
    assert float((values >= threshold_for(values, 0.3)).float().mean()) == pytest.approx(0.3)
    assert float((values >= threshold_for(values, 0.9)).float().mean()) == 1.0
    assert threshold_for(torch.ones(4), 0.5) == 1.0


@pytest.mark.parametrize("rate", [0.001, 0.9])
def test_a_rate_without_a_known_threshold_is_refused(pair, selector, heldout, rate):
    with pytest.raises(ConfigError, match=rf"trigger rate of {rate:g}; calibration knows 0.005 to 0.5"):
        calibrated(pair, selector, heldout).entropy_for(rate)


def test_a_probe_that_finds_more_becomes_the_trigger(pair, selector, heldout):
    slm = pair[0]
    save_probe(selector, torch.zeros(slm.hidden_size + 1), 0.0)
    useless = calibrated(pair, selector, heldout)
    assert useless.probe_above == 0.5 or useless.probe_above is None
    config = SelectorConfig.load(selector)
    better = config.model_copy(update={"calibration": useless.model_copy(update={"probe_above": 0.5})})
    assert isinstance(calibrated_trigger(selector, better), probe)


def test_an_uncalibrated_selector_has_no_trigger(selector):
    with pytest.raises(ConfigError, match=r"no thresholds.*calibrate"):
        calibrated_trigger(selector, SelectorConfig.load(selector))


def test_unfinished_rollouts_are_refused(pair, selector, heldout, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    manifest = json.loads((heldout / "manifest.json").read_text())
    (broken / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Exception, match="unfinished"):
        calibrated(pair, selector, broken)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(0, 0, 0, 1), (0, 10, 0, 0.2775), (5, 10, 0.2366, 0.7634), (475, 500, 0.9272, 0.9659)],
)
def test_wilson_intervals_are_the_textbooks(hits, n, low, high):
    assert wilson(hits, n) == pytest.approx((low, high), abs=1e-4)


def test_a_share_lies_in_its_own_interval():
    for n in range(1, 100):
        for hits in range(n + 1):
            low, high = wilson(hits, n)
            assert 0 <= low <= hits / n <= high <= 1, (hits, n)


def test_auc_is_the_chance_of_the_right_order():
    positive = torch.tensor([True, False, True, False])
    assert roc_auc(torch.tensor([4.0, 1.0, 3.0, 2.0]), positive) == 1.0
    assert roc_auc(torch.tensor([1.0, 4.0, 2.0, 3.0]), positive) == 0.0
    assert roc_auc(torch.ones(4), positive) == 0.5
    assert roc_auc(torch.ones(4), torch.ones(4, dtype=torch.bool)) is None


def mean_distance(rows) -> float:
    """Between confidence and share right, over ``reliability``'s rows: the expected calibration error."""
    return sum(abs(confidence - right) * count for confidence, right, count in rows) / sum(count for *_, count in rows)


def test_temperature_makes_confidence_mean_a_probability():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4000, 4, generator=generator)
    right = torch.multinomial((scores / 0.5).softmax(-1), 1, generator=generator)[:, 0]
    temperature = best_temperature(scores, right)
    assert temperature == pytest.approx(0.5, rel=0.1)
    picks = (scores / temperature).softmax(-1).max(-1)
    assert mean_distance(reliability(picks.values, picks.indices == right)) < 0.03
    overconfident = (scores / 0.1).softmax(-1).max(-1)
    assert mean_distance(reliability(overconfident.values, overconfident.indices == right)) > 0.1
