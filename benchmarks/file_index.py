"""Write the list of every file into ``docs/architecture.md``: ``python -m benchmarks.file_index``.

Each with the first paragraph of its docstring, the public names in it, and tests that import it; without any, the files
that import it, and where that is one alone, the tests that import that one; where nothing does, what names it.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "s2t_agents"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- begin: every file -->\n", "<!-- end: every file -->\n"
SHOWN = 4
"""Of the tests that import a file, those that import the least else."""


def written(page: str) -> str:
    """The page with the list as the files are now."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + file_list() + END + rest.split(END)[1]


def file_list() -> str:
    """A table for each folder, as Markdown."""
    readers, folders = readers_by_module(), defaultdict[str, list[Path]](list)
    for path in sorted(_files()):
        if path.name != "__init__.py":
            folders[path.parent.relative_to(ROOT).as_posix().removeprefix(f"{PACKAGE}/")].append(path)
    return "".join(_table(folder, folders[folder], readers) for folder in sorted(folders))


def readers_by_module() -> dict[str, list[str]]:
    """What imports each module, by name, those that import least else first: tests, or else files of the package.

    Where one file alone imports a module, the tests that import that file come after it.
    """
    homes = _exported()
    modules = {_module(path): _imported(path, homes) for path in _files()}
    tests = {path.name: _imported(path, homes) & modules.keys() for path in sorted((ROOT / "tests").glob("test_*.py"))}
    tested = {each: _special_first(tests, each) for each in modules}
    users = {each: _special_first(modules, each) for each in modules}
    return {
        each: tested[each]
        or [_shown(user) for user in users[each]] + (tested[users[each][0]] if len(users[each]) == 1 else [])
        or _naming(each)
        for each in modules
    }


def _special_first(imports: Mapping[str, set[str]], module: str) -> list[str]:
    return sorted((name for name, used in imports.items() if module in used), key=lambda name: len(imports[name]))


def _naming(module: str) -> list[str]:
    """Files whose text has a module's name, or its file's: it runs in a program of its own."""
    own = f"{module.rpartition('.')[2]}.py"
    tests = [(path.name, path) for path in sorted((ROOT / "tests").glob("test_*.py"))]
    files = [(_shown(_module(path)), path) for path in sorted(_files()) if path.name != own]
    texts = ((name, path.read_text(encoding="utf-8")) for name, path in [*tests, *files])
    return [name for name, text in texts if module in text or f'"{own}"' in text or f"/{own}`" in text]


def _shown(module: str) -> str:
    return f"{module.removeprefix(PACKAGE + '.').replace('.', '/')}.py"


def _files() -> list[Path]:
    return [*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "integrations").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]


def _imported(path: Path, homes: Mapping[str, tuple[str, str]]) -> set[str]:
    package = _module(path).rpartition(".")[0]
    return {_home(each, homes) for each in _imports(ast.parse(path.read_text(encoding="utf-8")), package)}


def _table(folder: str, paths: Iterable[Path], readers: Mapping[str, Sequence[str]]) -> str:
    rows = "".join(_row(path, readers[_module(path)]) for path in paths)
    head = "| file | what it is | names | tests |\n|---|---|---|---|\n"
    return f"<details><summary><code>{folder}/</code></summary>\n\n{head}{rows}\n</details>\n\n"


def _row(path: Path, readers: Sequence[str]) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    what = (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ").replace("|", "\\|").rstrip(".:")
    stem = path.stem.strip("_")
    own = f"test_{stem}.py"  # by its name, though it goes through other files
    tests = sorted((name for name in readers if name.startswith("test_")), key=lambda test: stem not in test)
    users = [name for name in readers if not name.startswith("test_")]
    if (ROOT / "tests" / own).exists():
        tests, users = [own, *(test for test in tests if test != own)], []
    through = f"through {_first(users)}" if users else ""
    names = ", ".join(f"`{name}`" for name in _names(tree))
    file, readers_shown = _shown(_module(path).removeprefix(f"{PACKAGE}.")), (through, _first(tests))
    return f"| `{file}` | {what} | {names} | {': '.join(filter(None, readers_shown))} |\n"


def _first(names: Sequence[str]) -> str:
    return ", ".join([*(f"`{name}`" for name in names[:SHOWN]), *(["…"] if len(names) > SHOWN else [])])


def _names(tree: ast.Module) -> Iterator[str]:
    """Public classes, functions and constants."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found = [node.name]
        elif isinstance(node, ast.Assign):
            found = [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            found = [name for name in found if name.isupper()]
        else:
            continue
        yield from (name for name in found if not name.startswith("_"))


def _module(path: Path) -> str:
    inside = path.relative_to(ROOT).with_suffix("").parts
    return ".".join((PACKAGE, *inside) if inside[0] == "integrations" else inside)  # which the wheel has inside


def _home(name: str, exported: Mapping[str, tuple[str, str]]) -> str:
    """The module that a name comes from, through every ``__init__.py`` on the way."""
    while name in exported:
        module, inner = exported[name]
        name = f"{module}.{inner}" if f"{module}.{inner}" in exported else module
    return name


def _imports(tree: ast.Module, package: str) -> Iterator[str]:
    """Modules, and names as ``module.name``: one of the two is a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            inside = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*inside, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def _exported() -> dict[str, tuple[str, str]]:
    """Names that a package's ``__init__.py`` offers, as ``package.name``: where each comes from, and its name there."""
    found: dict[str, tuple[str, str]] = {}
    for path in (ROOT / PACKAGE).rglob("__init__.py"):
        package = path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = f"{package}.{node.module}" if node.level else node.module
                found |= {f"{package}.{alias.name}": (module, alias.name) for alias in node.names}
    return found


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
