"""The documentation names files and classes that are there; the architecture page and the map, all folders."""

import re
from pathlib import Path

import pytest

from benchmarks import file_index

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "s2t_agents"
PAGES = ["CONTRIBUTING.md", "README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
MAPS = ["docs/architecture.md", "CONTRIBUTING.md"]
FILE = re.compile(r"(?<![\w/.])((?:[a-z_0-9]+/)*[a-z_0-9]+\.py)")
PLACES = [PACKAGE, ROOT, ROOT / "integrations", ROOT / "benchmarks", ROOT / "tests", *(ROOT / "examples").rglob("*")]


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_is_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(FILE.findall(text))
    folders = [PACKAGE, *(each for each in PACKAGE.rglob("*") if each.is_dir()), *PLACES]
    missing = {name for name in named if not any((place / name).exists() for place in folders)}
    assert named or page not in MAPS
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_every_name_that_stands_with_its_file_is_in_it(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for file, names in re.findall(r"`((?:[a-z_0-9]+/)*[a-z_0-9]+\.py): ([A-Za-z_, ]+)`", text):
        source = (PACKAGE / file).read_text(encoding="utf-8")
        for name in names.split(", "):
            assert re.search(
                rf"^(class|def|async def) {name}\b|^    (async )?def {name}\b|^{name}\b.* = ", source, re.M
            ), f"{name} in {file}"


def test_the_map_shows_every_folder_of_the_package() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for folder in PACKAGE.iterdir():
        if folder.is_dir() and folder.name != "__pycache__":
            assert f"  {folder.name}/" in text, folder.name


def test_the_list_of_every_file_is_as_the_files_are() -> None:
    page = file_index.PAGE.read_text(encoding="utf-8")
    assert page == file_index.written(page), "run python -m benchmarks.file_index"


def test_every_file_says_what_it_is() -> None:
    rows = re.findall(r"^\| `([\w./]+)` \| (.*?) \|", file_index.file_list(), re.M)
    assert len(rows) > 200
    assert [name for name, what in rows if len(what.split()) < 3] == []


def test_no_two_classes_of_the_package_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for name in re.findall(r"^class (\w+)", path.read_text(encoding="utf-8"), re.M):
            places.setdefault(name, []).append(str(path.relative_to(PACKAGE)))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}
