"""Everything that the README shows runs."""

import importlib.util
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_eight_line_quickstart_runs_calls_its_tool_and_answers_right() -> None:
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert sum(bool(line) for line in code.splitlines()) == 8
    scope: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), scope)
    messages = scope["run"]["messages"]
    assert [message.type for message in messages] == ["human", "ai", "tool", "ai"]
    assert "The answer is 94" in messages[-1].text
    assert messages[-1].response_metadata["s2t"]["budget"]["limit"] == {"escalations": 3}


def test_the_figures_shown_are_those_of_the_stored_results() -> None:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.sections(), "no stored results"
    for page in module.PAGES:
        text = page.read_text(encoding="utf-8")
        assert "begin -->" in text
        assert module.filled(text) == text, page.name


def test_the_commands_it_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert link.startswith("http") or (page.parent / link).exists(), (page.name, link)
