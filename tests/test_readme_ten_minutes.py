"""The README's ten minutes, command by command as they stand; only the port is a free one."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from browser import browsing
from servers import free_port

pytest.importorskip("starlette", reason="needs the extra `server`")
pytest.importorskip("langchain_openai")

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README[README.index("## In ten minutes") : README.index("## In your own program")]


def blocks(language: str) -> list[str]:
    """The section's code in one language, without its indentation."""
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```", SECTION, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for block in found]


class Run(NamedTuple):
    """What the section's commands left and said."""

    folder: Path
    printed: str
    looked: str
    live: str


def s2t(command: str) -> list[str]:
    """A shown command of this environment's ``s2t``."""
    name, *arguments = shlex.split(command.replace("\\\n", " "))
    assert name == "s2t"
    return [str(Path(sys.executable).with_name("s2t")), *arguments]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder, port = tmp_path_factory.mktemp("ten"), free_port()
    _, serve, look = blocks("sh")
    [agent] = blocks("python")
    (folder / "agent.py").write_text(agent.replace(":8000", f":{port}"))
    assert "`python agent.py`" in SECTION
    server = subprocess.Popen(
        [*s2t(serve), "--port", str(port)], cwd=folder, stdout=subprocess.PIPE, text=True, stderr=subprocess.STDOUT
    )
    try:
        assert server.stdout is not None
        assert any(f"127.0.0.1:{port}" in line for line in server.stdout)  # up to the line that says so
        asked = [sys.executable, "agent.py"]
        printed = subprocess.run(asked, cwd=folder, text=True, capture_output=True, timeout=300, check=True).stdout
        looked = "".join(
            subprocess.run(s2t(line), cwd=folder, text=True, capture_output=True, timeout=120, check=True).stdout
            for line in look.splitlines()
        )
        live = httpx.get(f"http://127.0.0.1:{port}/trace", timeout=60).text
        yield Run(folder, printed, looked, live)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def test_what_is_installed_is_what_the_package_offers() -> None:
    install = blocks("sh")[0]
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    [extras] = re.findall(r'"\.\[([\w,]+)\]"', install)
    assert set(extras.split(",")) <= set(settings["project"]["optional-dependencies"])
    assert "-c constraints.txt" in install
    for other in re.findall(r" ([a-z-]+)$", install, re.MULTILINE):
        assert re.search(rf"^{other}==", pinned, re.MULTILINE), other


def test_the_agent_says_what_is_shown(run: Run) -> None:
    assert [run.printed] == blocks("text")


def test_the_report_and_the_pages_have_its_answers(run: Run) -> None:
    assert "costs.db.html: 2 answers" in run.looked
    assert "default" in run.looked
    assert "?" not in run.looked  # every cost is known
    for page in ((run.folder / "costs.db.html").read_text(encoding="utf-8"), run.live):
        assert page.count('"trace":') == 2
        assert "get_stock" in page


def test_the_page_opens_in_a_browser_and_shows_who_picked_a_token(run: Run) -> None:
    with browsing() as browser:
        browser.open(run.folder / "costs.db.html")
        browser.click(".answer > button")
        assert "The answer is 94." in "".join(browser.texts(".token"))
        browser.click(".token.selector")
        assert "picked by the selector" in " ".join(browser.texts(".detail"))
        assert [each for each in browser.log() if each["level"] == "SEVERE"] == []
