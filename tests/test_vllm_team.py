"""examples/vllm/team.py against this suite's servers: four processes on one budget, one of them killed."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
from budget_support import redis_server  # noqa: F401
from servers import CompletionServer, selecting, serving

from s2t_agents.bundled import LLM, SLM, selector_path
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.selectors.config import SelectorConfig
from s2t_agents.selectors.head import HeadSelector
from s2t_agents.selectors.in_logits import EntropyAbove, LogitSelection

EXAMPLE = Path(__file__).parent.parent / "examples" / "vllm" / "team.py"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def slm() -> Iterator[CompletionServer]:
    """The bundled SLM with its selector inside."""
    model, folder = LanguageModel.load(SLM), selector_path(SLM)
    head = HeadSelector.read(folder, model, SelectorConfig.load(folder))
    with serving(selecting(model, LogitSelection(head, EntropyAbove(0.3), 8), SLM)) as running:
        yield running


@pytest.fixture(scope="module")
def llm() -> Iterator[CompletionServer]:
    with serving(LanguageModel.load(LLM)) as running:
        yield running


def store(request: pytest.FixtureRequest, folder: Path) -> str:
    """A Redis where there is one, else a file."""
    if shutil.which("redis-server") is None:
        return str(folder / "budget.db")
    return str(request.getfixturevalue("redis_server").url)


def test_four_processes_spend_one_budget_and_a_killed_one_gives_its_hold_back(
    slm: CompletionServer, llm: CompletionServer, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    usd, address = "0.001", f"vllm://127.0.0.1:{slm.server_port}/{SLM}"
    words = ["--slm", address, "--llm", llm.url, "--llm-name", LLM, "--store", store(request, tmp_path), "--usd", usd]
    more = ["--ledger", str(tmp_path / "team.db"), "--questions", "16", "--escalations", "200", "--json"]
    out = forked.run(str(EXAMPLE), *words, *more, timeout_s=800)
    assert out.stdout, out.stderr
    found: dict[str, Any] = json.loads(out.stdout)
    assert all(found["checks"].values()), found
    assert out.returncode == 0
    assert found["killed"]["holds"] == 1
    assert found["killed"]["returned_s"] > 0
    assert sum(part["refused"] for part in found["workers"].values()) > 0  # the budget was used up
    assert 0 < float(found["team"]["spent"]["usd"]) <= float(usd)
