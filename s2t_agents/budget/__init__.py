"""Budgets that hold: reserve before, settle after; nothing is reserved beyond a limit.

A ``Charge`` is reserved (``Budget.reserve``: one atomic step of a ``BudgetStore`` over the whole chain of budgets). The
``Hold`` is settled with what the call really cost, released, or lapses. Stores count charges as ``Quantities``, whole
numbers; ``Budget.state`` shows a meter as a ``BudgetState``.

budget, hold           what callers use                     store, meter             the protocol, and the arithmetic
quantities, money      from charges to whole numbers        memory_, sqlite_, redis_ the stores
terms, window, prices  limits and prices as they are given  state, refusals          what callers are shown
charges                what requests cost, and in sum
"""

import warnings
from collections.abc import Callable
from decimal import Decimal

from ..types import Charge, LimitWarning
from .budget import Budget
from .clock import Clock, SystemClock
from .hold import Hold
from .memory_store import MemoryStore
from .prices import DevicePrice, TokenPrice, known_price
from .redis_store import RedisStore
from .sqlite_store import SQLiteStore
from .state import BudgetState
from .store import BudgetStore
from .terms import OnExhausted
from .window import PER_DAY, PER_HOUR, PER_WEEK, Window

__all__ = [
    "PER_DAY",
    "PER_HOUR",
    "PER_WEEK",
    "Budget",
    "BudgetState",
    "BudgetStore",
    "Charge",
    "Clock",
    "DevicePrice",
    "Hold",
    "LimitWarning",
    "MemoryStore",
    "OnExhausted",
    "RedisStore",
    "SQLiteStore",
    "SystemClock",
    "TokenPrice",
    "Window",
    "known_price",
]


def __getattr__(name: str) -> Callable[..., Charge]:
    """``Amount``, which was version 0.1's name for a charge, with another order of arguments and no escalation."""
    if name != "Amount":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn("s2t_agents.budget.Amount is Charge now.", DeprecationWarning, stacklevel=2)
    return _amount


def _amount(usd: Decimal | None = None, escalations: int = 0, llm_tokens: int = 0) -> Charge:
    return Charge(usd, llm_tokens, escalations)
