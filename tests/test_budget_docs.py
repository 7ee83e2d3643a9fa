"""The examples in docs/budgets.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs" / "budgets.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_example_runs(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, "docs/budgets.md", "exec"), {})
    printed = capsys.readouterr().out
    assert any(
        shown in printed for shown in ("'usd': '0.0499094'", "0.0006", "{'budget': 'run', 'unit': 'answer_tokens'")
    )
