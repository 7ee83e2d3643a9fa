"""From one TOML file to the table, on tiny models: killed at every stage, the end is the same."""

import json
import shutil
import tomllib
from pathlib import Path

import forked
import pytest
from training_fixtures import JSONL_TASKS, save_model, tiny_pair, write_prompts
from typer.testing import CliRunner

from s2t_agents.errors import ConfigError
from s2t_agents.training import calibrate, evaluate, fit, probe, shards, train
from s2t_agents.training.choices import evaluation, lacking
from s2t_agents.training.commands import BUNDLED, app
from s2t_agents.training.config import Models, read_config
from s2t_agents.training.pipeline import pipeline

TOML = (
    """
out = "{out}"
seed = 3

[models]
slm = "{folder}/slm"
llm = "{folder}/llm"
device = "cpu"

[tasks.again]
task = "jsonl"
path = "{folder}/again.jsonl"
"""
    + JSONL_TASKS
    + """
[collect]
k = 8
max_tokens = 12
shard_items = 6
samples = 1

[train.head]
k = 4
width = 8
rate = 0.5
epochs = 1
batch = 16
evaluate_every = 2
validation = 0.3

[train.activated]
k = 4
rate = 0.5
epochs = 1
batch = 4
evaluate_every = 2
validation = 0.3
adapter = {{ rank = 2 }}

[calibrate]
trigger_rate = 0.2

[evaluate]
max_tokens = 12
budgets = [1]
votes = 2
agreement = 2
batch = 3
"""
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    slm, llm, _ = tiny_pair()
    save_model(slm, folder / "slm")
    save_model(llm, folder / "llm")
    for at, (part, count) in enumerate((("train", 12), ("heldout", 8), ("test", 4), ("again", 6))):
        write_prompts(folder / f"{part}.jsonl", count, first=1000 * at)
    return folder


def config_file(folder: Path, out: Path) -> Path:
    file = out.with_suffix(".toml")
    file.write_text(TOML.format(out=out, folder=folder))
    return file


def made(out: Path) -> dict[str, bytes]:
    """Everything that was made, but for clocks and paths."""
    found = {}
    for file in sorted(out.rglob("*")):
        clocked = file.name in ("report.json", "training.json") or file.parent.name == "answers"
        if clocked or not file.is_file():
            continue
        found[str(file.relative_to(out))] = file.read_bytes()
    report = json.loads((out / "evaluation" / "report.json").read_text())
    report.pop("seconds")
    report.pop("selectors")
    for row in report["rows"].values():
        row.pop("seconds")
    found["report"] = json.dumps(report, sort_keys=True).encode()
    return found


@pytest.fixture(scope="module")
def whole(folder):
    pipeline(read_config(config_file(folder, folder / "whole")))
    return made(folder / "whole")


class Killed(BaseException):
    """Stands for kill -9: nothing in the package catches it."""


@pytest.mark.parametrize(
    ("stage", "where", "name", "call"),
    [
        ("collect", shards, "write_whole", 3),
        ("collect on policy", shards, "write_whole", 7),
        ("train the first selector", fit, "save_checkpoint", 1),
        ("between training and saving", train, "save_probe", 2),
        ("train the last kind", fit, "save_checkpoint", 5),
        ("calibrate the first selector", calibrate, "write_card", 1),
        ("calibrate", calibrate, "write_card", 2),
        ("probe", probe, "write_whole", 1),
    ],
)
def test_killed_at_any_stage_and_started_again_the_end_is_the_same(
    folder, whole, tmp_path, monkeypatch, stage, where, name, call
):
    real, calls = getattr(where, name), []

    def dies(*args):
        calls.append(args)
        if len(calls) == call:
            raise Killed
        return real(*args)

    config = read_config(config_file(folder, tmp_path / "out"))
    monkeypatch.setattr(where, name, dies)
    with pytest.raises(Killed):
        pipeline(config)
    monkeypatch.undo()
    pipeline(config)
    assert made(tmp_path / "out") == whole, stage


@pytest.mark.slow
def test_several_processes_make_the_same_as_one(folder, tmp_path):
    for processes in (1, 2):  # each run in processes of its own: from the start the same, they agree to the bit
        file = config_file(folder, tmp_path / str(processes))
        file.write_text(f"processes = {processes}\n{file.read_text()}")
        run = forked.run("-c", "from s2t_agents.cli import main; main()", "pipeline", str(file))
        assert run.returncode == 0, run.stderr
    assert made(tmp_path / "1") == made(tmp_path / "2")


def test_the_second_round_is_answered_with_the_first_selector_in_charge(whole):
    settings = {part: json.loads(whole[f"rollouts/{part}/manifest.json"])["settings"] for part in ("train", "again")}
    assert settings["train"]["selector"] is None
    assert settings["again"]["selector"]
    first, second = (json.loads(whole[f"{name}/selector.json"])["training"] for name in ("first/head", "head"))
    assert second["trajectories"] > first["trajectories"]


def test_the_commands_print_tables_or_json(folder, whole):
    file = str(folder / "whole.toml")
    run = CliRunner()
    for command in (["collect"], ["train"], ["calibrate"], ["probe"]):
        shown = run.invoke(app, [*command, file])
        assert shown.exit_code == 0, shown.output
        assert "─" in shown.stdout or "━" in shown.stdout
    figures = run.invoke(app, ["probe", file, "--json"])
    assert json.loads(figures.stdout)["rows"][0]["by"] == "kl"
    for command, kinds in (("train", 2), ("calibrate", 2)):  # one document, however many there are
        assert len(json.loads(run.invoke(app, [command, file, "--json"]).stdout)) == kinds
    assert len(json.loads(run.invoke(app, ["collect", file, "--json"]).stdout)) == 2
    one = run.invoke(app, ["train", file, "--kind", "head", "--json"])
    assert json.loads(one.stdout)["kind"] == "head"
    report = run.invoke(app, ["eval", file, "--json"])
    assert set(json.loads(report.stdout)["rows"]["hybrid_1"]) >= {
        "accuracy", "ci95", "llm_calls", "llm_tokens", "seconds", "trigger_rate"
    }  # fmt: skip


def test_eval_takes_any_task_file_n_and_selectors(folder, whole):
    file, head = str(folder / "whole.toml"), str(folder / "whole" / "head")
    call = ["eval", file, "--task", str(folder / "test.jsonl"), "--n", "2", "--seed", "5", "--selector", head, "--json"]
    report = json.loads(CliRunner().invoke(app, call).stdout)
    assert (report["n"], report["seed"], report["hybrid"]) == (2, 5, "head")
    assert "activated" not in report["rows"]


def test_a_named_prompt_file_is_graded_as_asked_or_as_the_config_does(folder, whole):
    config = read_config(folder / "whole.toml")
    task = str(folder / "test.jsonl")

    def graded(grading):
        return evaluation(config, task, 2, 0, [], None, sweep=False, grading=grading).task.grading

    assert (graded(None), graded("math")) == ("numeric", "math")
    as_math = config.tasks.test.model_copy(update={"grading": "math"})
    config = config.model_copy(update={"tasks": config.tasks.model_copy(update={"test": as_math})})
    assert (graded(None), graded("exact")) == ("math", "exact")
    assert evaluation(config, None, None, None, [], None, sweep=False, grading="exact").task.grading == "exact"
    shown = CliRunner().invoke(app, ["eval", str(folder / "whole.toml"), "--grading", "guess"])
    assert (shown.exit_code, "guess" in shown.stderr) == (2, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("k = 8", "k = 99"), "collect.k: Input should be less than or equal to 64, it is 99"),
        (("seed = 3", "sede = 3"), "sede: Extra inputs are not permitted (did you mean seed?)"),
        (("[collect]", "[colect]"), "colect: Extra inputs are not permitted (did you mean collect?)"),
        (("[train.head]", "[train.haed]"), "train.haed: Input should be 'head', 'activated', 'adapted' or 'published'"),
        (('test.jsonl"', 'test.jsonl"\nfrist = 1'), "frist: Extra inputs are not permitted (did you mean first?)"),
        (("votes = 2", "votes = -7"), "evaluate.votes: Input should be greater than or equal to 0, it is -7"),
        (("[calibrate]", "[calibrate"), "is not TOML"),
        (("/slm", "/nowhere"), "no tokenizer at"),
        (("heldout.jsonl", "train.jsonl"), "share 12 prompts"),
        (("budgets = [1]", "budgets = [1, 2, 1]"), "evaluate.budgets: Value error, 1 is there more than once"),
        (("budgets = [1]", "budgets = [-1]"), "evaluate.budgets.0: Input should be greater than or equal to 0"),
        (("budgets = [1]", "ks = [0]"), "evaluate.ks.0: Input should be greater than or equal to 1"),
        (("budgets = [1]", "ks = [100000]"), "evaluate.ks.0: Input should be less than or equal to 64"),
        (("budgets = [1]", "rates = [5.0]"), "evaluate.rates.0: Input should be less than 1"),
    ],
)
def test_bad_settings_end_in_one_line_and_exit_code_2(folder, tmp_path, change, message):
    file = config_file(folder, tmp_path / "out")
    file.write_text(file.read_text().replace(*change))
    shown = CliRunner().invoke(app, ["pipeline", str(file)])
    assert shown.exit_code == 2
    assert message in shown.stderr
    assert shown.stderr.strip().splitlines()[-1].startswith("s2t: ")


def chosen(config, task=None, n=None, seed=None, selectors=(), **more):
    return evaluation(config, task, n, seed, list(selectors), None, sweep=False, **more)


def test_the_configs_own_task_takes_n_and_seed_too(folder, whole):
    bundled = read_config(BUNDLED)
    own = chosen(bundled)
    assert (own.task, own.seed) == (bundled.tasks.test, bundled.seed)
    other = chosen(bundled, n=10, seed=7)
    assert (other.task.count, other.task.first, other.seed) == (10, 700_000, 7)
    assert (chosen(bundled, "hard").task.count, chosen(bundled, "hard").seed) == (500, 0)
    config = read_config(folder / "whole.toml")
    assert (chosen(config).seed, len(chosen(config, n=2).task.open().items)) == (3, 2)


@pytest.mark.parametrize("slm", ["s2t-demo", "another"])
def test_only_the_configs_own_selectors_are_evaluated_and_those_missing_are_never_replaced(
    folder, whole, tmp_path, slm, monkeypatch
):
    config = read_config(folder / "whole.toml")
    config = config.model_copy(update={"models": Models(slm=slm), "out": tmp_path / "out"})
    assert chosen(config).selectors == {}  # before any training
    (tmp_path / "out" / "head").mkdir(parents=True)
    (tmp_path / "out" / "head" / "training.json").write_text("{}")
    assert chosen(config).selectors == {}  # after one that failed
    assert set(lacking(config, [])) == {"head", "activated"}
    for kind in ("activated", "published"):  # the second is no kind of this config
        shutil.copytree(folder / "whole" / "activated", tmp_path / "out" / kind)
    assert chosen(config).selectors == {"activated": tmp_path / "out" / "activated"}
    assert lacking(config, chosen(config).selectors) == {"head": tmp_path / "out" / "head"}
    monkeypatch.chdir(tmp_path)
    elsewhere = config.model_copy(update={"out": Path("nowhere")})
    assert chosen(elsewhere).selectors == {}
    assert lacking(elsewhere, [])["head"] == tmp_path / "nowhere" / "head"
    assert set(chosen(config, selectors=[Path("s2t-demo")]).selectors) == {"head"}  # asked for


def test_bundled_selectors_are_evaluated_with_the_bundled_config_until_its_own_are_there(folder, whole, tmp_path):
    config = read_config(BUNDLED).model_copy(update={"out": tmp_path})
    assert set(chosen(config, bundled=True).selectors) == {"head", "activated", "published"}
    shutil.copytree(folder / "whole" / "head", tmp_path / "head")
    assert chosen(config, bundled=True).selectors == {"head": tmp_path / "head"}


def test_eval_names_the_selectors_that_it_takes_and_those_that_are_not_there(folder, whole, tmp_path):
    file = config_file(folder, tmp_path / "out")
    for part in ("head", "rollouts"):
        shutil.copytree(folder / "whole" / part, tmp_path / "out" / part)
    shown = CliRunner().invoke(app, ["eval", str(file), "--n", "2"])
    assert shown.exit_code == 0, shown.output
    assert f"no activated selector at {tmp_path / 'out' / 'activated'}" in shown.stderr
    assert "no head selector" not in shown.stderr
    assert f"head: {tmp_path / 'out' / 'head'}" in shown.stdout.replace("\n", "")
    found = CliRunner().invoke(app, ["eval", str(file), "--n", "2", "--json"])
    assert json.loads(found.stdout)["selectors"] == {"head": str(tmp_path / "out" / "head")}


@pytest.mark.parametrize(
    ("command", "where", "name", "kept"),
    [
        ("collect", shards, "write_whole", "Whole shards are kept; the same command goes on"),
        ("train", fit, "save_checkpoint", "The last checkpoint is kept; the same command goes on"),
        ("calibrate", calibrate, "write_card", "the same command calibrates the others"),
        ("eval", evaluate, "gather", "Without --out nothing is kept"),
        ("eval --out", evaluate, "gather", "Rows that are done are kept in {out}; the same command goes on"),
        ("probe", probe, "write_whole", "the same command begins anew"),
        ("pipeline", shards, "write_whole", "All that is finished is kept; the same command goes on"),
    ],
)
def test_an_interruption_says_what_is_kept(folder, whole, tmp_path, monkeypatch, command, where, name, kept):
    def interrupted(*args):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    file = config_file(folder, out)
    if command not in ("collect", "pipeline"):
        shutil.copytree(folder / "whole", out)
    if command == "train":
        shutil.rmtree(out / "head")
    monkeypatch.setattr(where, name, interrupted)
    name, *options = command.split()
    shown = CliRunner().invoke(app, [name, str(file), *options, *([str(out)] if options else [])])
    assert shown.exit_code == 130
    line = shown.stderr.strip().splitlines()[-1]
    assert line.startswith("s2t: interrupted. ")
    assert kept.format(out=out) in line


def test_a_grading_for_the_demo_world_is_refused():
    for task in (None, "demo", "talk"):
        with pytest.raises(ConfigError, match="grading is 'exact', but the demo world grades its own problems"):
            chosen(read_config(BUNDLED), task, grading="exact")


def test_two_selectors_of_one_kind_are_refused(folder, whole, tmp_path):
    heads = [folder / "whole" / "head", folder / "whole" / "first" / "head"]
    with pytest.raises(ConfigError, match=r"head and .*first/head are both head selectors"):
        chosen(read_config(folder / "whole.toml"), selectors=heads)


def test_an_unknown_task_is_refused_before_anything_is_loaded_and_the_known_ones_are_listed(folder, tmp_path):
    file = config_file(folder, tmp_path / "out")
    file.write_text(file.read_text().replace("/slm", "/nowhere"))
    shown = CliRunner().invoke(app, ["eval", str(file), "--task", "nope"])
    assert (shown.exit_code, "nowhere" in shown.stderr) == (2, False)
    assert "task is 'nope'" in shown.stderr
    assert "demo, longer, larger, unseen, hard, talk, call, tool, word, or a JSONL file" in shown.stderr


@pytest.mark.parametrize("part", ["train", "heldout", "again"])
def test_problems_that_the_config_learns_or_calibrates_on_are_no_test(folder, whole, part):
    config = read_config(folder / "whole.toml")
    with pytest.raises(ConfigError, match=rf"\[tasks.{part}\] and the test task share 4 prompts"):
        chosen(config, str(folder / f"{part}.jsonl"), n=4)


def test_a_selector_is_tested_where_its_training_prompts_are_not(folder, tmp_path):
    file = config_file(folder, tmp_path / "out")
    file.write_text(file.read_text().replace("/train.jsonl", "/gone.jsonl"))
    assert chosen(read_config(file)).task.path.name == "test.jsonl"


def test_demo_problems_that_were_trained_on_are_no_test():
    config = read_config(BUNDLED)
    train = config.tasks.train.model_copy(update={"count": 20})
    near = train.model_copy(update={"first": train.first + 16})
    tasks = config.tasks.model_copy(update={"train": train, "test": near})
    with pytest.raises(ConfigError, match="share 4 prompts"):
        chosen(config.model_copy(update={"tasks": tasks}))


@pytest.mark.parametrize(
    "command", ["collect --part train", "collect --part heldout", "train", "calibrate", "pipeline"]
)
@pytest.mark.parametrize(("part", "shared"), [("heldout", "train"), ("test", "train"), ("test", "heldout")])
def test_parts_that_share_prompts_are_refused_before_the_work(folder, tmp_path, monkeypatch, command, part, shared):
    monkeypatch.setattr(Models, "load_slm", lambda self: pytest.fail("a model was loaded"))
    file = config_file(folder, tmp_path / "out")
    file.write_text(file.read_text().replace(f"/{part}.jsonl", f"/{shared}.jsonl"))
    name, *options = command.split()
    shown = CliRunner().invoke(app, [name, str(file), *options])
    assert shown.exit_code == 2
    assert f"[tasks.{shared}] and [tasks.{part}] share" in shown.stderr


def test_more_problems_than_the_config_gives_a_task_are_refused(folder, whole):
    config = read_config(folder / "whole.toml")
    with pytest.raises(ConfigError, match="n is 5, but the config's part holds 4 problems"):
        chosen(config, n=5)
    part = config.tasks.test.model_copy(update={"count": 3})
    tasks = config.tasks.model_copy(update={"test": part})
    with pytest.raises(ConfigError, match="n is 4, but the config's part holds 3 problems"):
        chosen(config.model_copy(update={"tasks": tasks}), n=4)
    assert len(chosen(config, str(folder / "test.jsonl")).task.open().items) == 4  # as many as there are


def test_a_place_where_no_report_can_be_is_refused_before_the_work(folder, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(Models, "load_slm", lambda self: pytest.fail("a model was loaded"))
    (tmp_path / "file").touch()
    call = ["eval", str(folder / "whole.toml"), "--out", str(tmp_path / "file" / "report")]
    shown = CliRunner().invoke(app, call)
    assert (shown.exit_code, "cannot be made" in shown.stderr) == (2, True)


@pytest.mark.parametrize("command", ["collect --part heldout", "train --kind head", "pipeline"])
def test_an_out_that_cannot_be_written_is_told_before_a_model_is_loaded(folder, tmp_path, monkeypatch, command):
    monkeypatch.setattr(Models, "load_slm", lambda self: pytest.fail("a model was loaded"))
    (tmp_path / "file").touch()
    file = config_file(folder, tmp_path / "config")
    file.write_text(TOML.format(out=tmp_path / "file" / "out", folder=folder))
    name, *options = command.split()
    shown = CliRunner().invoke(app, [name, str(file), *options])
    assert (shown.exit_code, "cannot be written" in shown.stderr) == (2, True), shown.output


@pytest.mark.parametrize("command", ["pipeline", "train", "calibrate", "collect --part again"])
def test_a_config_that_trains_nothing_is_refused_before_the_work(folder, tmp_path, monkeypatch, command):
    monkeypatch.setattr(Models, "load_slm", lambda self: pytest.fail("a model was loaded"))
    file = config_file(folder, tmp_path / "out")
    text = file.read_text()
    file.write_text(text[: text.index("[train.head]")] + "[train]\n" + text[text.index("[calibrate]") :])
    name, *options = command.split()
    shown = CliRunner().invoke(app, [name, str(file), *options])
    assert (shown.exit_code, "trains no selector" in shown.stderr) == (2, True)


def test_an_on_policy_round_without_prompts_is_refused_before_its_selector_is_trained(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Models, "load_slm", lambda self: pytest.fail("a model was loaded"))
    file = config_file(folder, tmp_path / "out")
    file.write_text(file.read_text().replace(f'[tasks.again]\ntask = "jsonl"\npath = "{folder}/again.jsonl"\n', ""))
    shown = CliRunner().invoke(app, ["collect", str(file), "--part", "again"])
    assert (shown.exit_code, "no [tasks.again]" in shown.stderr) == (2, True)


def test_a_missing_config_and_an_unknown_kind_are_named(folder, whole, tmp_path):
    with pytest.raises(ConfigError, match=r"gone.toml cannot be read"):
        read_config(tmp_path / "gone.toml")
    shown = CliRunner().invoke(app, ["train", str(folder / "whole.toml"), "--kind", "published"])
    assert "no [train.published]; it has head, activated" in shown.stderr


def test_the_bundled_config_is_sound_and_its_parts_share_nothing():
    config = read_config(BUNDLED)
    assert set(config.train) == {"head", "activated", "published"}
    assert tomllib.loads(BUNDLED.read_text())["tasks"]["test"]["split"] == "heldout"
    assert config.tasks.train.first + config.tasks.train.count <= config.tasks.heldout.first


def test_another_training_in_the_same_folder_is_refused(folder, whole, tmp_path):
    shutil.copytree(folder / "whole", tmp_path / "out")
    file = config_file(folder, tmp_path / "out")
    file.write_text(file.read_text().replace("width = 8", "width = 16"))
    shown = CliRunner().invoke(app, ["train", str(file), "--kind", "head"])
    assert shown.exit_code == 2
    assert "holds a selector of other settings" in shown.stderr
