"""A stage that ended without a fault and brought nothing says so, on the terminal and in JSON."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import forked
import pytest
import torch
from training_fixtures import JSONL_TASKS, save_model, tiny_pair, write_prompts
from typer.testing import CliRunner

from s2t_agents.intervals import wilson
from s2t_agents.selectors import SelectorConfig
from s2t_agents.selectors.config import Calibration
from s2t_agents.training import verdicts
from s2t_agents.training.card import write_card
from s2t_agents.training.commands import app
from s2t_agents.training.config import read_config
from s2t_agents.training.pipeline import pipeline
from s2t_agents.training.report import COLUMNS, EvalReport, RowReport, Tally, table
from s2t_agents.training.shards import read_shards

TOML = (
    """
out = "{folder}/runs"
[models]
slm = "{folder}/slm"
llm = "{folder}/llm"
device = "cpu"
"""
    + JSONL_TASKS
    + """
[collect]
k = 8
max_tokens = 12
samples = 1
[train.head]
k = 4
width = 8
rate = 0.5
epochs = 1
batch = 16
lr = 1e-12
evaluate_every = 2
validation = 0.3
[calibrate]
trigger_rate = 0.2
[evaluate]
max_tokens = 12
budgets = [1]
votes = 0
agreement = 2
"""
)


def config_in(folder: Path, **changed: str) -> Path:
    slm, llm, _ = tiny_pair()
    save_model(slm, folder / "slm")
    save_model(llm, folder / "llm")
    for at, (part, count) in enumerate((("train", 12), ("heldout", 8), ("test", 4))):
        write_prompts(folder / f"{part}.jsonl", count, first=1000 * at)
    text = TOML.format(folder=folder)
    for was, now in changed.items():
        text = text.replace(was, now)
    file = folder / "config.toml"
    file.write_text(text)
    return file


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A whole run whose learning rate is too small to change any order, and what it said meanwhile."""
    folder = tmp_path_factory.mktemp("verdicts")
    file, said = config_in(folder), []
    pipeline(read_config(file), said.append)
    return file, said


def shown(*words: str) -> str:
    out = CliRunner().invoke(app, list(words))
    assert out.exit_code == 0, out.output
    return out.stdout


def test_a_training_that_learned_nothing_says_so_everywhere(made):
    file, said = made
    sentence = "Learned nothing: no evaluation in "
    assert sentence in shown("train", str(file))
    figures = json.loads(shown("train", str(file), "--json"))["training"]
    assert figures["best_step"] == 0
    assert figures["verdict"].startswith(sentence)
    assert f"agreement {figures['agreement_untrained']:.1%}" in figures["verdict"]
    assert f"head: {figures['verdict']}" in said
    folder = file.parent / "runs" / "head"
    assert figures["verdict"] in (folder / "README.md").read_text()
    assert "verdict" not in SelectorConfig.load(folder).training


@pytest.mark.parametrize("figures", [{"best_step": 3, "steps": 4, "agreement_untrained": 0.5}, {"made_by": "a script"}])
def test_a_training_that_learned_something_or_of_which_nothing_is_known_has_no_verdict(made, figures, tmp_path):
    config = SelectorConfig.load(made[0].parent / "runs" / "head")
    config.model_copy(update={"training": figures}).save(tmp_path)
    write_card(tmp_path)
    assert "Learned nothing" not in (tmp_path / "README.md").read_text()
    assert verdicts.of_training(figures) is None


def test_rollouts_without_one_right_answer_say_how_they_were_graded(made):
    file, said = made
    sentence = "None of 16 answers is right as graded (numeric): check `grading`."  # 8 prompts, greedy and one sample
    out = shown("collect", str(file), "--part", "heldout")
    assert sentence in out
    assert "0.0%" in out
    assert json.loads(shown("collect", str(file), "--part", "heldout", "--json"))["verdict"] == sentence
    assert f"heldout: {sentence}" in said
    settings = read_config(file).collecting("heldout")
    shards = read_shards(settings.out)
    right = torch.zeros_like(shards[0].right)
    right[-1] = 1
    assert verdicts.of_rollouts(settings, [*shards[1:], replace(shards[0], right=right)]) is None


def test_rollouts_that_are_not_graded_are_not_called_wrong(tmp_path):
    file = config_in(tmp_path, **{'heldout.jsonl"': 'heldout.jsonl"\nanswers = false'})
    out = shown("collect", str(file), "--part", "heldout")
    assert "not graded" in out
    assert "None of" not in out
    assert "0.0%" not in out
    assert json.loads(shown("collect", str(file), "--part", "heldout", "--json"))["verdict"] is None


def test_probe_says_where_the_models_hardly_differ(made, tmp_path):
    file = config_in(tmp_path, **{"/llm": "/slm"})
    shown("collect", str(file), "--part", "heldout")
    sentence = "The models hardly differ: at 0.00% of the steps, in 0.0% of the answers (under 10%)."
    assert sentence in " ".join(shown("probe", str(file)).split())
    found = json.loads(shown("probe", str(file), "--json"))
    assert found["verdict"].startswith(sentence)
    assert found["answers_differing"] == 0
    other = json.loads(shown("probe", str(made[0]), "--json"))
    assert other["verdict"].startswith("The top 1% by kl are 2 steps, too few to judge Hit@K by (under 50)")
    assert other["answers_differing"] == 1
    assert "in 100.0% of the answers" in shown("probe", str(made[0]))


@pytest.mark.parametrize(
    ("steps", "answers", "hardly"), [(0.013, 0.4, False), (0.001, 0.1, False), (0.001, 0.09, True), (0.05, 0.01, True)]
)
def test_what_counts_is_how_many_answers_could_change(steps, answers, hardly):
    assert (verdicts.of_difference(steps, answers) is not None) is hardly


@pytest.mark.parametrize(("steps", "few"), [(1, True), (16, True), (49, True), (50, False), (900, False)])
def test_a_row_of_few_steps_says_so(steps, few):
    assert (verdicts.of_hits("entropy", 0.05, steps) is not None) is few


@pytest.mark.parametrize(
    ("changed", "said", "unsaid"),
    [
        (
            {"validation_groups": 2, "validation_trajectories": 1},
            "2 validation groups in 1 answers are too few",
            "Still",
        ),
        ({"validation_groups": 115, "validation_trajectories": 58}, "Learned nothing", "too few"),
        ({"best_step": 93, "agreement": 0.75}, "Still improving at the last of 93 steps (agreement 75.0%)", "Learned"),
    ],
)
def test_what_a_training_comes_to(changed, said, unsaid):
    verdict = verdicts.of_training({"best_step": 0, "steps": 93, "agreement_untrained": 1.0, **changed})
    assert said in verdict
    assert unsaid not in verdict


def calibration(**figures) -> Calibration:
    rates = {"trigger_rate": 0.05, "escalation_rate": 0.2}
    intervals = {f"{name}_ci95": (0.0, 1.0) for name in rates}
    return Calibration(trigger_entropy=0.1, escalation_margin=0.1, problems=80, seed=0, **rates, **intervals, **figures)


@pytest.mark.parametrize(
    ("alarms", "agreement", "greedy", "said"),
    [
        ((5, 19), (43, 78), 0.35, ["It changes 26.3% (95% 11.8% to 48.8%)", "`false_alarms = 0.05`"]),
        ((1, 19), (60, 78), 0.35, []),  # 5.3%, but perhaps far less
        ((0, 0), (60, 78), 0.35, []),
        ((0, 19), (30, 78), 0.35, ["no more for sure than the small model alone (35.0%)"]),
        ((0, 19), (10, 78), 0.35, ["less (12.8% (95%", "do not use it"]),
        ((9, 19), (30, 78), 0.35, ["It changes 47.4%", "no more for sure"]),
    ],
)
def test_what_a_calibration_comes_to_is_told_by_its_intervals(alarms, agreement, greedy, said):
    found = calibration(
        agreement=agreement[0] / agreement[1],
        agreement_ci95=wilson(*agreement),
        agreement_greedy=greedy,
        false_alarms=alarms[0] / alarms[1] if alarms[1] else None,
        false_alarms_ci95=wilson(*alarms) if alarms[1] else None,
    )
    verdict = verdicts.of_calibration(found)
    assert (verdict is None) is (not said)
    for each in said:
        assert each in verdict


def row(name: str, mended: int, broken: int, flipped: int = 9) -> RowReport:
    """80 problems, of which the small model alone gets 52 right."""
    slm = [at < 52 for at in range(80)]
    right = [at >= broken if at < 52 else at < 52 + mended for at in range(80)]
    tally = Tally(name, right=right)
    tally.count.update(steps=400, flipped=flipped)
    return tally.report(slm, slm, None)


@pytest.mark.parametrize(
    ("llm", "head", "said"),
    [
        ((22, 5), (10, 8), ["head makes 10 answers right and 8 wrong, no sure gain", "head breaks 15.4%"]),
        ((22, 5), (20, 1), []),
        ((22, 5), (0, 0, 0), ["head changes nothing (flips 0%)"]),
        ((22, 5), (28, 9), ["head breaks 17.3%"]),
        ((4, 3), (20, 1), ["The LLM alone makes 4 answers right and 3 wrong, no sure gain: there may be no gap"]),
        ((22, 5), (2, 0), ["head makes 2 answers right and 0 wrong, no sure gain"]),
    ],
)
def test_what_a_table_comes_to(llm, head, said):
    rows = {"slm": row("slm", 0, 0, 0), "head": row("head", *head), "llm": row("llm", *llm)}
    verdict = verdicts.of_table(rows)
    assert (verdict or "").count("no sure gain") == " ".join(said).count("no sure gain")
    assert (verdict is None) is (not said)
    for each in said:
        assert each in verdict


def test_calibrate_and_eval_say_what_their_figures_come_to(made):
    file, said = made
    found = json.loads(shown("calibrate", str(file), "--json"))
    assert found["verdict"] in " ".join(said)
    assert found["verdict"] in (file.parent / "runs" / "head" / "README.md").read_text()
    assert "verdict" in shown("calibrate", str(file))
    table_of = json.loads(shown("eval", str(file), "--json"))
    assert "head changes nothing (flips 0%)" in table_of["verdict"]
    assert table_of["verdict"] in " ".join(shown("eval", str(file)).split())  # with what is in brackets


def test_shares_of_different_steps_have_different_names_and_figures_are_short(made):
    of_training, of_calibration = (" ".join(shown(command, str(made[0])).split()) for command in ("train", "calibrate"))
    assert "agreement (held-back steps of high entropy or KL)" in of_training
    assert "agreement (triggered steps)" in of_calibration
    assert max(len(figure) for figure in re.findall(r"\d\.\d+", of_calibration)) < 10
    assert "(0" not in of_calibration  # no tuples


@pytest.mark.parametrize(("n", "seconds", "each"), [(4, 10.0, "2.50"), (500, 20.0, "0.04"), (1, 0.5, "0.50")])
def test_the_table_has_seconds_an_answer_and_the_words_of_the_docs(n, seconds, each):
    right = [True] * n
    row = Tally("slm", right=right, seconds=seconds).report(right, right, None)
    report = EvalReport(
        task="t", n=n, seed=0, slm={}, llm={}, hybrid=None, settings={}, rows={"slm": row}, seconds=45.0
    )
    made = table(report)
    assert "45 s this run" in str(made.title)
    (cell,) = made.columns[COLUMNS.index("s an answer")].cells
    assert cell == each
    assert "harm" in COLUMNS
    assert "broken" not in COLUMNS
    docs = Path(__file__).parent.parent / "docs"
    assert "| MB | s an answer |" in (docs / "escalation.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["calibrate", "probe", "pipeline"])
def test_without_matplotlib_one_line_says_that_there_are_no_plots(made, command):
    shutil.rmtree(made[0].parent / "runs" / "evaluation", ignore_errors=True)  # whose selector was another's
    without = "import sys; sys.modules['matplotlib'] = None; from s2t_agents.cli import main; main()"
    out = forked.run("-c", without, command, str(made[0]))
    assert out.returncode == 0, out.stderr
    assert out.stderr.count("no plots: matplotlib is not installed (extra train)\n") == 1


@pytest.mark.parametrize("command", ["collect", "train", "calibrate", "eval", "probe", "pipeline"])
def test_help_says_what_runs_without_a_file_and_shows_no_cut_path(command):
    out = " ".join(CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "120"}).stdout.split())
    assert "default: the bundled pair's (29 minutes in all)" in out
    assert "selector.toml" not in out
    assert "site-packages" not in out
