"""The command line: help in a blink, one clear line on bad input."""

import json
import subprocess
import sys
from pathlib import Path

import forked
import pytest

import s2t_agents
from benchmarks.commands import TrainShape
from benchmarks.train import SHAPES
from s2t_agents import Ledger, __version__
from s2t_agents.ledger import GenerationRecord


def s2t(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return forked.run("-c", "from s2t_agents.cli import main; main()", *arguments, stdin=stdin)


def test_help_lists_the_commands() -> None:
    command = [sys.executable, "-m", "s2t_agents.cli", "--help"]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.returncode == 0
    assert all(command in out.stdout for command in ("demo", "chat"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chat", "--model", "/no/such/model"), "no tokenizer at '/no/such/model'"),
        (("chat", "--selector", "/no/such/selector"), "selector.json is missing"),
    ],
)
def test_bad_input_is_one_clear_line_and_a_non_zero_exit(arguments: tuple[str, ...], message: str) -> None:
    out = s2t(*arguments, stdin="hello\n")
    assert out.returncode == 2
    assert message in " ".join(out.stderr.split())
    assert "Traceback" not in out.stderr


@pytest.mark.parametrize("option", ["--model", "--selector"])
def test_a_chat_with_what_is_not_there_fails_although_nobody_says_a_word(option: str) -> None:
    assert s2t("chat", option, "/no/such/thing").returncode == 2


def test_the_version_is_told() -> None:
    assert s2t("--version").stdout == f"s2t-agents {__version__}\n"


def test_a_shape_that_the_training_benchmark_does_not_know_is_refused_with_those_it_knows() -> None:
    assert {shape.value for shape in TrainShape} == set(SHAPES)
    out = s2t("bench", "train", "--shape", "9b")
    assert out.returncode == 2
    assert all(shape in out.stderr for shape in ("9b", "0.5b", "tiny"))


def test_without_a_checkout_the_benchmarks_are_said_to_be_missing_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "s2t_agents").symlink_to(Path(s2t_agents.__file__).parent)  # as if it were in site-packages
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from s2t_agents.cli import main; main()"
    command = [sys.executable, "-c", code, "bench", "decode", "--quick"]
    out = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (out.returncode, out.stdout, out.stderr.count("\n")) == (2, "", 1)
    assert "needs the folder benchmarks/" in out.stderr
    assert "checkout of s2t-agents" in out.stderr


def test_the_benchmarks_have_a_help_of_their_own() -> None:
    out = s2t("bench", "--help")
    assert out.returncode == 0
    assert all(
        name in out.stdout for name in ("budget", "decode", "gpu", "ledger", "pacing", "schemas", "soak", "train")
    )


@pytest.mark.parametrize(
    "wrong",
    [
        ("demo", "--escalations", "-1"),
        ("demo", "--budget-escalations", "-1"),
        ("serve", "--escalations", "-1"),
        ("report", "costs.db", "--by", "moon"),
        ("collect", "--part", "moon"),
        ("eval", "--grading", "moon"),
        ("serve", "--usd", "moon"),
        ("serve", "--llm", "s2t-demo-llm", "--usd", "1"),
        ("serve", "--budgets", "spent.db"),
        ("serve", "--trace"),
    ],
    ids=" ".join,
)
def test_options_are_checked_before_anything_runs_and_errors_name_them(wrong: tuple[str, ...]) -> None:
    out = s2t(*wrong)
    assert (out.returncode, out.stdout) == (2, "")
    assert next(each for each in wrong[::-1] if each.startswith("--")).strip("-") in out.stderr
    assert "loading" not in out.stderr


def test_help_shows_brackets_as_they_are() -> None:
    assert "[tasks.named]" in s2t("eval", "--help").stdout


def test_report_adds_up_a_ledger_in_three_forms(tmp_path: Path) -> None:
    path = tmp_path / "costs.jsonl"
    ledger = Ledger.open(path)
    for agent, tokens in (("writer", 3), ("critic", 4), ("writer", 5)):
        ledger.record(GenerationRecord(agent=agent, completion_tokens=tokens))
    ledger.close()
    found = json.loads(s2t("report", str(path), "--json").stdout)
    assert found["groups"]["writer"]["completion_tokens"] == 8
    assert "critic" in s2t("report", str(path)).stdout
    assert s2t("report", str(path), "--csv").stdout.count("\n") == 3
    for wrong, message in ((("--by", "moon"), "moon"), (("--json", "--csv"), "both given")):
        out = s2t("report", str(path), *wrong)
        assert (out.returncode, message in out.stderr) == (2, True)
    assert "there is no such ledger" in s2t("report", "nothing.jsonl").stderr
