"""docs/serve.md and the commands ``s2t serve`` and ``s2t key``, as they stand."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import forked
import httpx
import pytest
import server_support

from s2t_agents import Ledger
from s2t_agents.server.tenants import KeyFile, Tenants

PAGE = (Path(__file__).parents[1] / "docs" / "serve.md").read_text(encoding="utf-8")
COMMAND = "from s2t_agents.cli import main; main()"


def test_the_page_from_its_top_to_its_end_against_the_command_it_shows(tmp_path: Path) -> None:
    pytest.importorskip("langchain_openai")
    [shown] = re.findall(r"^s2t (serve .*)$", PAGE, re.MULTILINE)
    options = shown.replace("costs.db", str(tmp_path / "costs.db")).split()
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *options, "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        found = re.search(r"127\.0\.0\.1:\d+", process.stdout.readline())
        assert found
        scope: dict[str, Any] = {}
        blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
        assert blocks
        for block in blocks:
            exec(compile(block.replace("127.0.0.1:8000", found[0]), "docs/serve.md", "exec"), scope)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    agents = [record.agent for record in Ledger.reading(tmp_path / "costs.db").records()]
    assert agents[:4] == ["default", "default", "default", "counter"]
    assert set(agents[4:]) == {"default"}


def test_the_key_file_it_shows_is_one() -> None:
    [shown] = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    tenants = Tenants(KeyFile.model_validate(tomllib.loads(shown)).agents)
    assert len(tenants.budgets) == 2


def test_a_key_that_the_command_makes_opens_the_server_that_has_its_entry(tmp_path: Path) -> None:
    made = forked.run("-c", COMMAND, "key", "ann").stdout
    [key] = re.findall(r"s2t-\S+", made)
    file = tmp_path / "keys.toml"
    file.write_text(made[made.index("[agents") :].replace("# budget", "budget"))
    assert key not in file.read_text()
    tenant = Tenants.from_file(file).tenant_of({"authorization": f"Bearer {key}"})
    assert tenant.agent == "ann"
    assert tenant.budget is not None
    assert tenant.budget.state().limit["escalations"] == 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "--keys"),
        (["--keys", "/no/such/file"], "s2t key"),
        (["--model", "/no/such/model"], "/no/such/model"),
        (["--usd", "much"], "usd"),
        (["--usd", "1", "--llm", "s2t-demo-llm"], "no known price"),
        (["--llm-price", "0.5", "--llm", "s2t-demo-llm"], "0.50/1.50"),
        (["--llm-price", "x/1", "--llm", "s2t-demo-llm"], "--llm-price"),
        (["--llm-price", "1/2"], "Give --llm"),
        (["--device-price", "-1"], "--device-price"),
        (["--trace"], "--ledger"),
    ],
)
def test_what_cannot_be_served_is_one_line(options: list[str], message: str) -> None:
    done = forked.run("-c", COMMAND, "serve", "--port", "0", *options)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_health_of_what_the_page_says_is_plain() -> None:
    with server_support.serving_chat(server_support.demo_model()) as url:
        assert httpx.get(url.replace("/v1", "/health")).json() == {"status": "ok"}
