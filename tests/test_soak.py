"""The soak, for seconds: cancelled agents on tight budgets leave no hold, no queue and no KV behind."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "soak.py"


@pytest.mark.slow
def test_nothing_is_left_behind() -> None:
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = asyncio.run(module.soak(0.15))
    assert module.leaks(result) == []
    assert result["answered"] > 0
    assert result["cancelled"] + result["left"] > 0
