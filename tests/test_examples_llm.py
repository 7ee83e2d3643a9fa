"""One runnable example per kind of LLM, each run as its reader would, the server's against this suite's own."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest
import servers
from servers import CompletionServer, serving

from s2t_agents.bundled import LLM
from s2t_agents.scheduling.language_model import LanguageModel

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *words: str) -> str:
    out = forked.run(str(EXAMPLES / name), *words)
    assert out.returncode == 0, out.stderr
    return out.stdout


@pytest.fixture(scope="module")
def server() -> Iterator[CompletionServer]:
    with serving(LanguageModel.load(LLM)) as running:
        yield running


def test_a_local_llm() -> None:
    said = run("llm_local.py")
    assert "picked by the LLM" in said
    assert " 0 picked by the LLM" not in said


def test_an_openai_compatible_server(server: CompletionServer) -> None:
    said = run("llm_openai_server.py", "--url", server.url, "--model", LLM)
    assert len(server.asked) > 0
    assert f"{len(server.asked)} picked by the LLM for $0.0000" in said
    assert "degraded: False" in said


def test_a_server_that_is_not_there() -> None:
    said = run("llm_openai_server.py", "--url", f"http://127.0.0.1:{servers.free_port()}/v1")
    assert "0 picked by the LLM for $0.0000000, degraded: True" in said


def test_a_judge() -> None:
    said = run("llm_judge.py")
    assert "sentences decided by the judge, degraded: False" in said


def test_picks_over_a_server_are_the_local_ones(server: CompletionServer) -> None:
    seen = json.loads(run("vllm/compare.py", "--url", server.url, "--model", LLM, "--answers", "3"))
    assert seen["alike"]
    assert seen["questions"] == seen["same_picks"] > 0


@pytest.mark.parametrize("script", sorted((EXAMPLES / "vllm").glob("*.sh")), ids=lambda script: script.name)
def test_the_vllm_scripts_are_ones_that_a_shell_takes(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
