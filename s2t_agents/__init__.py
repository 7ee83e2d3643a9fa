"""s2t-agents: a LangChain chat model with a small local LM, a trained top-K selector and an LLM within a budget.

Public names are imported on first use: importing the package takes milliseconds and does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import _moved

__version__ = "0.1.0"

_HOMES = {
    "ChatJudge": "llms",
    "ChatS2T": "chat.chat_model",
    "Concurrency": "scheduling.admission",
    "Budget": "budget",
    "DevicePrice": "budget",
    "RedisStore": "budget",
    "SQLiteStore": "budget",
    "TokenPrice": "budget",
    "Ledger": "ledger",
    "LocalLLM": "llms",
    "OpenAILLM": "llms",
    "Escalation": "escalation",
    "Pacing": "escalation",
    "Engine": "engine.engine",
    "LanguageModel": "scheduling.language_model",
    "Step": "types",
    "errors": "errors",
    "triggers": "triggers",
}

__all__ = [
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

if TYPE_CHECKING:
    from . import errors, triggers
    from .budget import Budget, DevicePrice, RedisStore, SQLiteStore, TokenPrice
    from .chat.chat_model import ChatS2T
    from .engine.engine import Engine
    from .escalation import Escalation, Pacing
    from .ledger import Ledger
    from .llms import ChatJudge, LocalLLM, OpenAILLM
    from .scheduling.admission import Concurrency
    from .scheduling.language_model import LanguageModel
    from .types import Step


_moved.install()


def __getattr__(name: str) -> Any:
    """Import a public name from its module."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f".{_HOMES[name]}", __name__)
    found = module if name in ("errors", "triggers") else getattr(module, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """The public names."""
    return [*__all__, "__version__"]
