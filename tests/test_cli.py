"""The command line: help in a blink, one clear line on bad input."""

import subprocess
import sys

import pytest


def s2t(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "s2t_agents.cli", *arguments], input=stdin, capture_output=True, text=True, check=False
    )


def test_help_lists_the_commands() -> None:
    out = s2t("--help")
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


def test_limits_are_checked_before_anything_runs() -> None:
    out = s2t("demo", "--budget-escalations", "-1")
    assert out.returncode == 2
    assert "budget-escalations" in out.stderr
