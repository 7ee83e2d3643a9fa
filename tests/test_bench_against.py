"""Another commit beside the working tree: both measure in turns; a commit that is not there is named."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from benchmarks import against
from s2t_agents.errors import ConfigError

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the repository's history")


def left_behind() -> bool:
    listed = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return f"{os.getpid()}-" in listed


def test_a_commit_that_is_not_there_is_refused_and_leaves_nothing() -> None:
    with pytest.raises(ConfigError, match="no-such-commit"), against.checkout("no-such-commit"):
        pytest.fail("there is none")
    assert not left_behind()


def test_a_bench_that_is_terminated_leaves_nothing() -> None:
    with pytest.raises(SystemExit), against.terminated_by_exit(), against.checkout("HEAD"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert not left_behind()


def test_a_model_that_is_not_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'9b'.*s2t-demo, qwen2.5-0.5b"):
        against.run("HEAD", model="9b")


def test_a_version_that_cannot_be_measured_is_named(tmp_path: Path) -> None:
    (tmp_path / "s2t_agents").mkdir()
    (tmp_path / "s2t_agents" / "__init__.py").touch()  # has no public names
    with pytest.raises(ConfigError, match="public names"), against.Probe(tmp_path, {}):
        pytest.fail("there is nothing to measure")


@pytest.mark.slow
def test_both_versions_measure_every_row_and_the_checkout_is_removed() -> None:
    result = against.run("HEAD", quick=True)
    assert not left_behind()
    assert set(result["models"]) == set(against.QUICK)
    for found in result["models"].values():
        assert set(found["rows"]) == set(against.ROWS)
        for row, times in found["rows"].items():
            assert set(times) == set(against.TIMES if row != "eight at once" else against.TIMES[:1])
            assert all(each["ratio"] == pytest.approx(each["new"] / each["old"]) for each in times.values())
    assert against.table(result).row_count == sum(len(m["rows"]) + len(m["memory"]) for m in result["models"].values())
