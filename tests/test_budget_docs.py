"""The examples in docs/budgets.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs" / "budgets.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_example_runs(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, "docs/budgets.md", "exec"), {})
    said = re.findall(r"^ *print\(.*\)(?: +# (.+))?$", block, re.MULTILINE)
    expected = [".*".join(map(re.escape, each.split("..."))) for each in said]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(expected) > 0
    for line, pattern in zip(printed, expected, strict=True):
        assert re.fullmatch(pattern, line), f"docs/budgets.md says {pattern}, and it printed {line}"
