"""docs/own-selector.md from its top to its end, on the bundled pair: its lines, its file, its commands, its code."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from s2t_agents.demo import world
from s2t_agents.training.commands import app
from s2t_agents.training.grading import GRADERS
from s2t_agents.training.tasks import JsonlTask

PAGE = (Path(__file__).parent.parent / "docs" / "own-selector.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def of_the_demo_world(seed: int) -> str:
    problem = world.generate(seed, "train", "word")
    return json.dumps({"prompt": problem.prompt, "answer": problem.gold[-1]["content"]})


def run(commands: str) -> None:
    for line in commands.strip().splitlines():
        name, *words = shlex.split(line)
        if name == "mv":
            shutil.move(*words)
            continue
        shown = CliRunner().invoke(app, words)
        assert (name, shown.exit_code) == ("s2t", 0), f"{line}: {shown.output}"


def test_the_lines_are_what_the_page_says_of_them(tmp_path: Path) -> None:
    (lines,) = blocks("json")
    (tmp_path / "mine.jsonl").write_text(lines)
    task = JsonlTask(tmp_path / "mine.jsonl", "numeric")
    assert [item.id for item in task.items] == ["mon-1", "mon-2", "mon-3"]
    assert [message["role"] for message in task.items[2].messages] == ["user", "assistant", "tool"]
    assert "no tool named get_stock" in task.call(task.items[2], "get_stock", {"item": "lamps"})
    assert task.grade(task.items[2], "85 - 28 = 57. The answer is 57.")
    shown = re.findall(r"^\| `(\w+)`(?: \(default\))? \| (?:the same|an equivalent)", PAGE, re.MULTILINE)
    assert set(shown) == set(GRADERS)


def test_its_file_commands_and_code_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (lines,), (config,), (make, again), (code,) = map(blocks, ("json", "toml", "sh", "python"))
    rows = [*lines.strip().splitlines(), *map(of_the_demo_world, range(5_000_000_000, 5_000_000_020))]
    (tmp_path / "mine.jsonl").write_text("\n".join(rows))
    for shown, small in (
        ("first = 300", "first = 9"),
        ("count = 700", "count = 14"),
        ("first = 100\n", "first = 3\n"),
        ("count = 200", "count = 6"),
        ("count = 100", "count = 3"),
    ):
        assert shown in config, shown
        config = config.replace(shown, small)
    (tmp_path / "mine.toml").write_text(config + "\n[calibrate]\ntrigger_rate = 0.3\n")
    run(make)
    report = json.loads((tmp_path / "runs/mine/table/report.json").read_text())
    assert set(report["rows"]) == {"slm", "random", "head", "llm_select", "takeover", "hybrid_2", "llm"}
    asks_always = 'record="paid.jsonl", margin=1.0'  # whatever so short a training makes it sure of
    exec(compile(code.replace('record="paid.jsonl"', asks_always), "docs/own-selector.md", "exec"), {})
    run(again)
    figures = json.loads((tmp_path / "runs/mine/head/selector.json").read_text())
    assert figures["training"]["paid_groups"] > 0
    assert figures["calibration"] is not None
