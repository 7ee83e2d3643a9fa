"""Everything that the README shows runs."""

import ast
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

from benchmarks import readme

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_eight_line_quickstart_runs_calls_its_tool_and_answers_right() -> None:
    _, code, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)  # test_readme_ten_minutes', test_llamacpp_chat's
    assert sum(bool(line) for line in code.splitlines()) == 8
    scope: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), scope)
    messages = scope["run"]["messages"]
    assert [message.type for message in messages] == ["human", "ai", "tool", "ai"]
    assert messages[-1].text in README
    told = messages[-1].response_metadata["s2t"]
    assert f"{told['flips']} token changed, {told['escalations']} of 3 escalations spent" in " ".join(README.split())
    assert messages[-1].response_metadata["s2t"]["budget"]["limit"] == {"escalations": 3}


def test_the_figures_shown_are_those_of_the_stored_results() -> None:
    assert readme.sections(), "no stored results"
    for page in readme.PAGES:
        text = page.read_text(encoding="utf-8")
        assert "begin -->" in text
        assert readme.filled(text) == text, page.name


def test_the_commands_it_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[0].split()
    shown = re.findall(r"`make ([\w-]+)", README)
    assert {"demo", "test"} <= set(shown)
    for target in [*shown, *phony]:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_what_the_api_reference_is_made_from_is_there_and_described() -> None:
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    [below] = re.findall(r"^API := s2t_agents \$\(addprefix s2t_agents\., (.+)\)$", makefile, re.MULTILINE)
    for name in below.split():
        file = ROOT / "s2t_agents" / Path(*name.split("."))
        file = ROOT / Path(*name.split(".")) if name.startswith("integrations.") else file
        source = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
        assert ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))), name


PAGES = sorted(
    page
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md"))
    if page.name != "CHANGELOG.md"
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_lead_somewhere(page: Path) -> None:
    for link, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        target = page.parent / link if link else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), f"{link}#{anchor}"


def anchors(page: Path) -> set[str]:
    """What a heading is linked by: lower case, blanks as dashes, no punctuation."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "name", ["getting-started", "langgraph", "escalation", "trace", "too-expensive", "team-budget"]
)
def test_the_code_of_a_page_runs_from_its_top_to_its_end(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^ *```python\n(.*?)```", page, re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        exec(compile(textwrap.dedent(block), f"docs/{name}.md", "exec"), scope)
