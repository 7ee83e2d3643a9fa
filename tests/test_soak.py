"""The soak, for seconds: cancelled agents on tight budgets leave no hold, no queue and no KV behind."""

from __future__ import annotations

import pytest

from benchmarks import soak


@pytest.mark.slow
def test_nothing_is_left_behind() -> None:
    result = soak.run(0.15)
    assert result["leaked"] == []
    assert result["answered"] > 0
    assert result["cancelled"] + result["left"] > 0
