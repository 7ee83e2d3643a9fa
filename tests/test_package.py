"""The package: fast to import, layered one way, complete in its wheel."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import s2t_agents
from s2t_agents import _moved

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "s2t_agents"

LAYERS = [  # imports go down this list only, or stay on their own line
    {"errors"},
    {
        "types",
        "call_scope",
        "redaction",
        "identity",
        "fork_safety",
        "atomic_write",
        "sqlite_file",
        "greedy",
        "intervals",
    },
    {"budget"},
    {"ledger"},
    {"telemetry"},
    {"endpoints"},
    {"bundled"},
    {"hub", "checkpoint_checks"},
    {"tokenization"},
    {"formats"},
    {"grammar"},
    {"backends"},
    {"scheduling"},
    {"proposal"},
    {"triggers", "selectors", "llms"},
    {"escalation"},
    {"engine"},
    {"chat"},
    {"testing"},
    {"demo", "training"},
    {"integrations"},
    {"server", "trace", "audit"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def modules() -> list[tuple[str, Path]]:
    """Every file with the layer it stands on."""
    files = [(p.relative_to(PACKAGE).parts[0].removesuffix(".py"), p) for p in PACKAGE.rglob("*.py")]
    files += [("integrations", p) for p in (ROOT / "integrations").rglob("*.py")]
    return [(layer, path) for layer, path in files if layer not in ("__init__", "_moved")]


def imported_layers(path: Path) -> set[str]:
    """Layers of this package that a file imports, at the top or inside functions."""
    inside = path.is_relative_to(PACKAGE)
    package = ("s2t_agents", *path.relative_to(PACKAGE).parent.parts) if inside else ("s2t_agents", "integrations")
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names = [f"{module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("s2t_agents.")}
    return found


@pytest.mark.parametrize(("layer", "path"), modules(), ids=lambda value: getattr(value, "stem", value))
def test_imports_go_one_way(layer: str, path: Path) -> None:
    upward = {name for name in imported_layers(path) if name in RANK and RANK[name] > RANK[layer]}
    assert not upward, f"{path.name} imports {upward} from above"


def test_the_package_imports_itself_by_relative_names_alone() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert str(node.module).split(".")[0] != "s2t_agents", f"{path}:{node.lineno}"


def test_layers_on_one_line_import_each_other_in_one_direction() -> None:
    beside: dict[str, set[str]] = {name: set() for name in RANK}
    for layer, path in modules():
        beside[layer] |= {name for name in imported_layers(path) if RANK.get(name) == RANK[layer] and name != layer}
    assert any(beside.values())
    TopologicalSorter(beside).prepare()  # CycleError names the cycle


def test_training_uses_nothing_above_the_chat_model_but_the_demo_world() -> None:
    above = {name for name in RANK if RANK[name] > RANK["chat"]} - {"training", "demo"}
    for layer, path in modules():
        if layer == "training":
            assert not imported_layers(path) & above, path.name


def test_nothing_below_the_command_line_uses_training() -> None:
    for layer, path in modules():
        if layer not in ("training", "cli"):
            assert "training" not in imported_layers(path), path.name


def test_every_module_has_a_layer() -> None:
    assert {layer for layer, _ in modules()} <= set(RANK)


def test_the_package_loads_nothing_else_and_budget_and_ledger_no_torch() -> None:
    code = (
        "import sys; before = set(sys.modules); import s2t_agents;"
        "loaded = {each.split('.')[0] for each in set(sys.modules) - before} - sys.stdlib_module_names;"
        "assert loaded == {'s2t_agents'}, loaded;"
        "s2t_agents.Budget(escalations=1); s2t_agents.Ledger();"
        "heavy = {'torch', 'transformers', 'langchain'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_public_names_are_these() -> None:
    assert s2t_agents.__all__ == [
        "Budget",
        "ChatJudge",
        "ChatS2T",
        "Concurrency",
        "DevicePrice",
        "Engine",
        "Escalation",
        "LanguageModel",
        "Ledger",
        "LocalLLM",
        "OpenAILLM",
        "Pacing",
        "RedisStore",
        "SQLiteStore",
        "Step",
        "TokenPrice",
        "errors",
        "triggers",
    ]
    for name in s2t_agents.__all__:
        assert getattr(s2t_agents, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = s2t_agents.Nothing


def wheel() -> Any:
    """What pyproject.toml says is in the wheel."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def test_the_wheel_lists_every_package_and_the_integrations() -> None:
    settings = wheel()
    folders = {".".join(p.parent.relative_to(ROOT).parts) for p in PACKAGE.rglob("__init__.py")}
    assert set(settings["packages"]) == folders | {"s2t_agents.integrations"}
    import s2t_agents.integrations as shipped

    assert Path(str(shipped.__file__)).parent.name == "integrations"


def test_the_wheel_has_no_benchmarks_and_imports_none() -> None:
    assert {name.split(".")[0] for name in wheel()["packages"]} == {"s2t_agents"}
    assert not [name for name in wheel()["packages"] if "bench" in name]
    for _, path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not [name for name in names if name.split(".")[0] == "benchmarks"], path.name


def test_the_wheel_has_of_the_demo_what_commands_use_and_nothing_that_trained_the_pair() -> None:
    demo = PACKAGE / "demo"
    [patterns] = wheel()["package-data"].values()
    data = {path for pattern in patterns for path in PACKAGE.glob(pattern) if path.is_file()}
    assert {p for p in data if not p.is_relative_to(demo / "weights")} == {
        PACKAGE / "py.typed",
        PACKAGE / "trace" / "page.html",
        demo / "selector.toml",
    }
    names = {path.stem for path in demo.glob("*.py")} - {"__init__"}
    used, read = {"agent", "show", "world"}, set[str]()  # what the command line and the demo task import
    while fresh := used - read:
        read |= fresh
        for name in fresh:
            tree = ast.parse((demo / f"{name}.py").read_text(encoding="utf-8"))
            imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
            used |= names & {str(node.module).split(".")[-1] for node in imports}
            used |= names & {alias.name for node in imports for alias in node.names}
    assert names == used


def drawn_parents(tree: str) -> dict[str, set[str]]:
    """Each class of a drawn tree with its parents: the line above at the level before, and those in brackets."""
    line_of = re.compile(r"(?P<indent>[│├└─ ]*)(?P<name>\w+)(?: \((?P<also>[\w, ]+)\))?(?:  .*)?")
    parents: dict[str, set[str]] = {}
    above: list[str] = []
    for line in tree.splitlines():
        found = line_of.fullmatch(line)
        assert found, line
        level = len(found["indent"]) // 4
        above = [*above[:level], found["name"]]
        assert len(above) == level + 1, f"{line} hangs in the air"
        assert found["name"] not in parents, f"{line} is drawn twice"
        parents[found["name"]] = {*above[-2:-1], *(found["also"].split(", ") if found["also"] else ())}
    return parents


def test_the_error_tree_is_drawn_as_it_is() -> None:
    from s2t_agents import errors

    paragraphs = str(errors.__doc__).split("\n\n")
    [tree] = [each for each in paragraphs if each.startswith("S2TError ")]
    defined = {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.S2TError)
    }
    bases = {name: {base.__name__ for base in value.__bases__} for name, value in defined.items()}
    assert drawn_parents(tree) == bases


def test_weights_in_the_repository_stay_under_24_mb() -> None:
    assert sum(p.stat().st_size for p in (PACKAGE / "demo").rglob("*.safetensors")) <= 24 * 2**20


@pytest.mark.parametrize("name", _moved.MOVED)
def test_modules_that_the_documentation_named_before_still_import(name: str) -> None:
    with pytest.warns(DeprecationWarning, match=re.escape(_moved.MOVED[name])):
        old = importlib.import_module(f"s2t_agents.{name}")
    new = importlib.import_module(f"s2t_agents.{_moved.MOVED[name]}")
    public = [each for each in vars(new) if not each.startswith("_")]
    assert public
    assert all(getattr(old, each) is getattr(new, each) for each in public)
    del sys.modules[f"s2t_agents.{name}"]


NAME = re.compile(r"(?<![\w./-])s2t_agents(?:\.[A-Za-z_]\w*)+")


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))])
def test_every_dotted_name_in_the_documentation_can_be_resolved(page: str) -> None:
    names = sorted(set(NAME.findall((ROOT / page).read_text())))
    assert [name for name in names if not name.endswith(".py") and not _resolves(name)] == []


def _resolves(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return name.endswith(".decisions") and find_spec("langchain_core.decisions") is None  # older than 1.8
    return True
