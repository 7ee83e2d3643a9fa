"""Modules that had other names in version 0.1: imports of these still work, with a ``DeprecationWarning``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "chat_model": "chat.chat_model",
    "engine.admission": "scheduling.admission",
    "engine.steps": "engine.engine",
    "llms.circuit_breaker": "endpoints.circuit_breaker",
    "messages": "chat.messages",
    "models": "scheduling.language_model",
    "models.language_model": "scheduling.language_model",
    "models.writing": "atomic_write",
    "selectors.question": "llms.question",
    "unfinished": "chat.unfinished_answers",
}
"""Those that the documentation named."""


class MovedModules(MetaPathFinder, Loader):
    """Finds a module of an old name under its new one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See ``importlib.abc.MetaPathFinder``."""
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == __package__ and name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """An empty one of the old name."""
        alias = ModuleType(spec.name)
        alias.__path__ = []  # so that modules below it are looked for, too
        return alias

    def exec_module(self, module: ModuleType) -> None:
        """Give the alias the names of the new module."""
        new = import_module(f"{__package__}.{MOVED[module.__name__.partition('.')[2]]}")
        warnings.warn(f"{module.__name__} is {new.__name__} now.", DeprecationWarning, stacklevel=2)
        vars(module).update({name: value for name, value in vars(new).items() if not name.startswith("__")})


def install() -> None:
    """Serve the old names from now on."""
    sys.meta_path.append(MovedModules())
