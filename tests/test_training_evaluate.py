"""The table: the same problems for all rows, decisions that are the engine's, figures that add up."""

import json
import queue
import shutil

import pytest
import torch
from training_fixtures import QUICK, prompts, tiny_pair, write_prompts

from s2t_agents.errors import ConfigError, InputError
from s2t_agents.selectors import SelectorConfig
from s2t_agents.selectors.config import BaseIdentity
from s2t_agents.training import progress
from s2t_agents.training.calibrate import calibrate_with
from s2t_agents.training.choices import found_selectors, with_trigger
from s2t_agents.training.collect import collect_with
from s2t_agents.training.config import (
    Adapter,
    CalibrateConfig,
    EvaluateConfig,
    EvaluationRows,
    Fit,
    Models,
    Pipeline,
    ProbeConfig,
    Targets,
    Tasks,
)
from s2t_agents.training.evaluate import evaluate_with
from s2t_agents.training.grading import Numeric
from s2t_agents.training.objectives import fresh_selector
from s2t_agents.training.plots import draw, draw_hits, draw_reliability
from s2t_agents.training.probe import probe_with
from s2t_agents.training.report import Tally
from s2t_agents.training.shards import read_shards
from s2t_agents.training.tasks import DemoTask, DemoTaskConfig, JsonlTask, JsonlTaskConfig

ROWS = EvaluationRows(
    budgets=(1, 2, 4, 8), votes=3, max_tokens=16, batch=5, agreement=5, k=4, ks=(1, 4), rates=(0.1, 0.3)
)
NAMES = [
    "slm", "maj3", "random", "head", "activated", "adapted", "published", "llm_select", "takeover",
    "hybrid_1", "hybrid_2", "hybrid_4", "hybrid_8", "llm",
]  # fmt: skip


@pytest.fixture(scope="module")
def pair():
    return tiny_pair()


@pytest.fixture(scope="module")
def made(pair, tmp_path_factory):
    """Held-out rollouts, and calibrated selectors of every kind that change many picks."""
    folder = tmp_path_factory.mktemp("evaluate")
    slm, _, teacher = pair
    collect_with(slm, teacher, prompts(folder, 12, first=300), QUICK, folder / "rollouts")
    for kind in ("head", "activated", "adapted", "published"):
        selector = fresh_selector(slm, kind, Fit(width=16, adapter=Adapter(rank=2)))
        with torch.random.fork_rng():
            torch.manual_seed(1)
            for parameter in selector.parameters():
                parameter.data.normal_(0, 0.3)
        selector.save(folder / kind, SelectorConfig(kind=kind, base=BaseIdentity.of(slm), k=4))
        targets = Targets(trigger_rate=0.2, escalation_rate=0.5)
        calibrate_with(
            slm,
            CalibrateConfig(selector=folder / kind, rollouts=folder / "rollouts", targets=targets),
        )
    return folder


def settings(made, **changed) -> EvaluateConfig:
    selectors = {kind: made / kind for kind in ("head", "activated", "adapted", "published")}
    return EvaluateConfig(models=Models(), task=DemoTaskConfig(), **{"selectors": selectors, "rows": ROWS, **changed})


@pytest.fixture(scope="module")
def report(pair, made):
    slm, llm, _ = pair
    return evaluate_with(slm, llm, prompts(made, 6), settings(made))


def test_every_row_is_there_over_the_same_problems(report):
    assert list(report.rows) == NAMES
    assert {row.n for row in report.rows.values()} == {6}
    assert list(report.sweeps["k"])[1] == "llm_select, K = 1"
    assert len(report.sweeps["rate"]) == 2


def test_the_table_as_json_has_the_rows_and_figures_of_the_method(pair, made):
    slm, llm, _ = pair
    rows = EvaluationRows(max_tokens=6, agreement=0, k=4, budgets=(0, 1, 2, 4, 8))
    found = json.loads(evaluate_with(slm, llm, prompts(made, 3), settings(made, rows=rows)).model_dump_json())["rows"]
    assert set(found) == {
        "slm", "maj8", "random", "head", "activated", "adapted", "published", "llm_select", "takeover",
        "hybrid_0", "hybrid_1", "hybrid_2", "hybrid_4", "hybrid_8", "llm",
    }  # fmt: skip
    for row in found.values():
        assert {"accuracy", "ci95", "llm_calls", "llm_tokens", "seconds", "trigger_rate", "cost_usd"} <= set(row)
    assert found["hybrid_0"]["llm_calls"] == 0
    assert found["hybrid_0"]["tokens"] == found[best_kind(made)]["tokens"]


def test_rows_with_a_limit_are_the_same_whatever_other_limits_there_are(pair, made):
    slm, llm, _ = pair
    quick = EvaluationRows(max_tokens=12, agreement=0, k=4, votes=2, batch=4)
    found = {}
    for budgets in ((0, 1, 2, 8), (1,), (0,)):
        config = settings(made, rows=quick.model_copy(update={"budgets": budgets}), selectors={"head": made / "head"})
        found[budgets] = evaluate_with(slm, llm, prompts(made, 6), config).rows
    assert found[0, 1, 2, 8]["hybrid_8"].llm_calls > found[0, 1, 2, 8]["hybrid_1"].llm_calls > 0
    for limit in (0, 1):
        many, one = (found[key][f"hybrid_{limit}"].model_dump() for key in ((0, 1, 2, 8), (limit,)))
        assert {k: v for k, v in many.items() if k != "seconds"} == {k: v for k, v in one.items() if k != "seconds"}


def best_kind(made) -> str:
    """The kind that the hybrid rows take: the best held-out agreement."""
    kinds = ("head", "activated", "adapted", "published")
    return max(kinds, key=lambda kind: SelectorConfig.load(made / kind).calibration.agreement)


def test_no_row_asks_the_llm_more_often_than_it_may(report):
    rows = report.rows
    for name in ("slm", "maj3", "random", "head", "activated", "adapted", "published"):
        assert rows[name].llm_calls == rows[name].llm_tokens == rows[name].escalation_rate == 0
    for limit in (1, 2, 4, 8):
        assert rows[f"hybrid_{limit}"].llm_calls <= limit
    assert rows["hybrid_1"].llm_calls < rows["hybrid_4"].llm_calls
    assert rows["llm_select"].escalation_rate == rows["takeover"].escalation_rate == 1
    assert rows["llm"].llm_calls == rows["llm"].tokens > rows["llm_select"].llm_calls > 0
    assert rows["llm"].cost_usd is None
    assert rows["slm"].cost_usd == 0


def test_forwards_are_counted(report):
    rows = report.rows
    assert rows["slm"].slm_forwards == rows["slm"].tokens == rows["head"].slm_forwards == rows["head"].tokens
    assert rows["activated"].slm_forwards > rows["activated"].tokens
    assert rows["llm"].slm_forwards == 0
    assert rows["maj3"].tokens > 2 * rows["slm"].tokens


def test_the_random_row_triggers_as_often_as_the_selectors_do(pair, made):
    slm, llm, _ = pair
    quick = ROWS.model_copy(update={"ks": (), "rates": (), "budgets": (), "trigger_rate": 0.5})
    rows = evaluate_with(slm, llm, prompts(made, 10), settings(made, rows=quick)).rows
    assert rows["random"].trigger_rate == pytest.approx(0.5, abs=0.15)


def test_agreement_is_whole_where_the_llm_selects(report):
    assert report.rows["llm_select"].agreement == 1.0
    assert 0 <= report.rows["head"].agreement < 1
    assert report.rows["slm"].agreement is None


def test_one_candidate_is_greedy(report):
    narrow = report.sweeps["k"]["llm_select, K = 1"]
    assert (narrow.flip_rate, narrow.tokens) == (0, report.rows["slm"].tokens)
    assert narrow.trigger_rate > 0


def test_two_runs_agree_and_chunks_do_not_matter(pair, made, report):
    slm, llm, _ = pair
    again = evaluate_with(slm, llm, prompts(made, 6), settings(made, rows=ROWS.model_copy(update={"batch": 4})))
    for name, row in report.rows.items():
        same = again.rows[name]
        assert (same.accuracy, same.tokens, same.llm_calls, same.llm_tokens, same.trigger_rate) == (
            row.accuracy,
            row.tokens,
            row.llm_calls,
            row.llm_tokens,
            row.trigger_rate,
        ), name


def test_plots_are_drawn(report, made, tmp_path):
    assert [file.name for file in draw(report, tmp_path)] == ["pareto.png", "sweep-k.png", "sweep-rate.png"]
    calibration = SelectorConfig.load(made / "head").calibration
    assert draw_reliability(calibration, tmp_path / "r.png").stat().st_size > 1000
    assert draw_hits({"top 1% by kl": [0.3, 0.9]}, tmp_path / "h.png").stat().st_size > 1000


def test_an_uncalibrated_or_missing_selector_is_refused(pair, made, tmp_path):
    slm, llm, _ = pair
    with pytest.raises(ConfigError, match="needs a calibrated selector, or to know when the LLM is asked"):
        evaluate_with(slm, llm, prompts(made, 2), settings(made, selectors={}))
    selector = fresh_selector(slm, "head", Fit(width=8))
    selector.save(tmp_path / "head", SelectorConfig(kind="head", base=BaseIdentity.of(slm), k=4))
    with pytest.raises(ConfigError, match="no thresholds"):
        evaluate_with(slm, llm, prompts(made, 2), settings(made, selectors={"head": tmp_path / "head"}))
    with pytest.raises(ConfigError, match="holds a head selector, not activated"):
        evaluate_with(slm, llm, prompts(made, 2), settings(made, selectors={"activated": made / "head"}))


def test_without_a_selector_there_are_the_rows_that_need_none(pair, made, report):
    slm, llm, _ = pair
    nats = SelectorConfig.load(made / report.hybrid).calibration.entropy_for(ROWS.llm_trigger_rate)
    rows = EvaluationRows(**{**ROWS.model_dump(), "llm_trigger_entropy": nats, "ks": (1, 4)})
    found = evaluate_with(slm, llm, prompts(made, 6), settings(made, selectors={}, rows=rows))
    assert list(found.rows) == ["slm", "maj3", "llm_select", "takeover", "llm"]
    assert found.hybrid is None
    for name in ("slm", "llm_select", "takeover", "llm"):
        assert found.rows[name].trigger_rate == report.rows[name].trigger_rate, name
    assert list(found.sweeps) == ["k"]


def test_without_a_selector_the_trigger_is_read_off_the_held_out_rollouts(made, tmp_path):
    (tmp_path / "rollouts").mkdir()
    shutil.copytree(made / "rollouts", tmp_path / "rollouts" / "heldout")
    tasks = Tasks(**{part: JsonlTaskConfig(task="jsonl", path=made / part) for part in ("train", "heldout", "test")})
    pipeline = Pipeline(out=tmp_path, models=Models(slm="another"), tasks=tasks, train={})
    nats = with_trigger(pipeline, EvaluationRows(llm_trigger_rate=0.25)).llm_trigger_entropy
    entropy = torch.cat([shard.entropy for shard in read_shards(made / "rollouts")])
    assert float((entropy >= nats).float().mean()) == pytest.approx(0.25, abs=2 / len(entropy))
    assert with_trigger(pipeline, EvaluationRows(llm_trigger_entropy=0.5)).llm_trigger_entropy == 0.5
    assert found_selectors(pipeline, []) == {}  # the bundled ones are for another model
    shutil.rmtree(tmp_path / "rollouts")
    assert with_trigger(pipeline, EvaluationRows()).llm_trigger_entropy is None


def test_what_a_row_breaks_and_mends_is_against_the_same_problems():
    tally = Tally("head", right=[True, False, True, True])
    row = tally.report(slm=[True, True, False, False], llm=[True, True, True, True], price=None)
    assert (row.accuracy, row.gap_closed, row.broken) == (0.75, 0.5, 0.5)


def test_a_known_price_becomes_a_cost_and_an_unknown_one_stays_unknown():
    tally = Tally("hybrid_1", right=[True, True])
    tally.count["llm_tokens"] = 300
    assert tally.report([True, True], [True, True], price=2e-6).cost_usd == pytest.approx(3e-4)
    assert tally.report([True, True], [True, True], price=None).cost_usd is None


def test_sufficiency_counts_what_is_in_the_shards(pair, made):
    slm, _, _ = pair
    found = probe_with(slm, ProbeConfig(models=Models(), rollouts=made / "rollouts"))
    shards = read_shards(made / "rollouts")
    kl = torch.cat([shard.kl for shard in shards])
    hit = torch.cat([(shard.candidates[:, :4] == shard.llm_best[:, None]).any(1) for shard in shards])
    row = next(row for row in found.rows if (row.by, row.rate) == ("kl", 0.1))
    chosen = kl >= kl.sort(descending=True).values[round(0.1 * len(kl)) - 1]
    assert row.hits[3] == pytest.approx(float(hit[chosen].float().mean()), abs=1e-4)
    assert list(row.hits) == sorted(row.hits)
    assert found.steps == len(kl)


def test_the_demo_worlds_tools_are_run():
    task = DemoTask("heldout", 0, 40, ["tool"])
    item = task.items[0]
    call = item.source.expected_call
    assert task.call(item, call.name, call.arguments) == call.result
    assert "error" in task.call(item, "nothing_like_it", {})
    assert task.grade(item, item.source.gold[-1]["content"])
    assert not task.grade(item, "The answer is 1000001.")


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("so 3 + 4 = 7. The answer is 7.", "7", True),
        ("The answer is 7. I had 3 of them.", "7", True),
        ("#### 1,234", "1234", True),
        (r"\boxed{42.0}", "42", True),
        ("no idea", "7", False),
        ("8", "7", False),
    ],
)
def test_numbers_are_read_from_the_answer(text, answer, right):
    assert Numeric().right(text, answer) is right


def test_a_prompt_that_does_not_fit_is_refused(pair, made, tmp_path):
    slm, llm, _ = pair

    file = tmp_path / "long.jsonl"
    file.write_text('{"prompt": "' + "a" * 600 + '", "answer": "1"}\n')
    with pytest.raises(InputError, match="512|511|token"):
        evaluate_with(slm, llm, JsonlTask(file, "numeric"), settings(made))


class Interrupted(JsonlTask):
    """Counts what it grades, and is interrupted after so many."""

    graded, limit = 0, float("inf")

    def grade(self, item, text):
        if self.graded >= self.limit:
            raise KeyboardInterrupt
        self.graded += 1
        return super().grade(item, text)


def figures(report) -> dict:
    return {
        name: row.model_dump(exclude={"seconds"}) for name, row in {**report.rows, **report.sweeps.get("k", {})}.items()
    }


def test_a_killed_run_goes_on_where_it_was(pair, made, tmp_path):
    slm, llm, _ = pair
    file = write_prompts(tmp_path / "prompts.jsonl", 6)
    rows = EvaluationRows(max_tokens=8, agreement=2, k=4, ks=(2,), budgets=(1,), votes=2, batch=4)
    only = {"head": made / "head"}
    config = settings(made, rows=rows, out=tmp_path / "out", selectors=only)
    task = Interrupted(file, "numeric")
    task.limit = 21
    with pytest.raises(KeyboardInterrupt):
        evaluate_with(slm, llm, task, config)
    again = Interrupted(file, "numeric")
    report = evaluate_with(slm, llm, again, config)
    whole = evaluate_with(slm, llm, JsonlTask(file, "numeric"), settings(made, rows=rows, selectors=only))
    assert figures(report) == figures(whole)
    per_row = len(again.items)
    assert again.graded <= per_row * len(figures(whole)) - task.graded + rows.batch
    last = Interrupted(file, "numeric")
    assert figures(evaluate_with(slm, llm, last, config)) == figures(whole)
    assert last.graded == 0


def test_progress_counts_answers_within_a_row(pair, made, tmp_path, monkeypatch):
    slm, llm, _ = pair
    post = queue.SimpleQueue()
    monkeypatch.setattr(progress, "TELL_S", 0.0)
    monkeypatch.setattr(progress, "_post", post)
    task = JsonlTask(write_prompts(tmp_path / "prompts.jsonl", 5), "numeric")
    rows = EvaluationRows(max_tokens=4, agreement=0, k=4, budgets=(1, 2), votes=3, batch=4)
    config = settings(made, rows=rows, selectors={"head": made / "head"}, out=tmp_path / "out")
    for whole in (0, 1):  # the second time, from what was kept
        evaluate_with(slm, llm, task, config)
        told = [post.get() for _ in range(post.qsize())]
        assert told[0].total == 5 * (9 + 2)  # nine rows, one of them with three samples
        assert told[-1].done == told[0].total
        assert len({each.done for each in told}) > 16 or whole


def test_a_majority_of_no_samples_is_no_row(pair, made, tmp_path):
    slm, llm, _ = pair
    task = JsonlTask(write_prompts(tmp_path / "prompts.jsonl", 2), "numeric")
    rows = EvaluationRows(max_tokens=4, agreement=0, k=4, budgets=(), votes=0, batch=2)
    found = list(evaluate_with(slm, llm, task, settings(made, rows=rows)).rows)
    assert not any(name.startswith("maj") for name in found)
    assert {"slm", "head", "llm_select", "llm"} <= set(found)


def test_answers_are_there_to_be_looked_at(pair, made, tmp_path):
    slm, llm, _ = pair
    rows = EvaluationRows(max_tokens=6, agreement=0, k=4, budgets=(), votes=2, batch=2)
    task = JsonlTask(write_prompts(tmp_path / "prompts.jsonl", 3), "numeric")
    evaluate_with(slm, llm, task, settings(made, rows=rows, out=tmp_path / "out"))
    kept = sorted(file.name for file in (tmp_path / "out" / "answers").iterdir())
    assert {"manifest.json", "00000-slm.json", "00001-slm.json", "00000-llm_select.json"} <= set(kept)
    first = json.loads((tmp_path / "out" / "answers" / "00000-slm.json").read_text())
    assert [answer["item"] for answer in first["answers"]] == [item.id for item in task.items[:2]]
    for answer in first["answers"]:
        assert len(answer["turns"][0]["ids"]) <= 6
        assert isinstance(answer["text"], str)


@pytest.mark.parametrize("changed", [{"seed": 1}, {"rows": EvaluationRows(max_tokens=7, agreement=0, k=4, budgets=())}])
def test_answers_of_another_evaluation_are_not_taken(pair, made, tmp_path, changed):
    slm, llm, _ = pair
    rows = EvaluationRows(max_tokens=6, agreement=0, k=4, budgets=())
    config = settings(made, rows=rows, out=tmp_path / "out", selectors={"head": made / "head"})
    task = JsonlTask(write_prompts(tmp_path / "prompts.jsonl", 2), "numeric")
    evaluate_with(slm, llm, task, config)
    with pytest.raises(ConfigError, match="other settings: (seed is 0 there and 1|max_tokens is 6 there and 7) now"):
        evaluate_with(slm, llm, task, config.model_copy(update=changed))
    dearer = rows.model_copy(update={"llm_usd_per_million": 3.0})  # a price changes no answer
    assert evaluate_with(slm, llm, task, config.model_copy(update={"rows": dearer})).rows["llm"].cost_usd
    (tmp_path / "out" / "answers" / "00000-llm.json").write_text("{}")
    with pytest.raises(InputError, match="holds no answers"):
        evaluate_with(slm, llm, task, config)
