"""A meter that was opened in its store: what all budgets over it share, whatever their views."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import BadLimit
from .names import checked_name
from .quantities import UNITS, public
from .store import BudgetStore, Terms
from .unsettled import UnsettledCharges


@dataclass(frozen=True, slots=True)
class MeterHandle:
    """One meter, found or made in its store.

    Args:
        store: where it lives.
        unsettled: charges of this process that could not be settled yet; one queue for a whole tree.
        path: where in the tree, as ``fleet/run/agent``.
        terms: what it was opened with.
        priced: it or one above it limits dollars.
        local: it or one above it limits what the local model does: answers, their tokens, or time.
    """

    store: BudgetStore
    unsettled: UnsettledCharges
    path: str
    terms: Terms
    priced: bool
    local: bool

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @classmethod
    def open_root(cls, name: str, terms: Terms, store: BudgetStore) -> MeterHandle:
        """Open the first meter of a tree.

        Raises:
            ConfigError: a name that cannot be part of a path.
            BadLimit: it exists with other terms.
            StoreUnavailable: the store cannot be reached.
        """
        agreed = _agreed(store, checked_name(name), terms)
        return cls(store, UnsettledCharges(), name, agreed, agreed.limits.usd is not None, _limits_local_work(agreed))

    def open_child(self, name: str, terms: Terms | None) -> MeterHandle:
        """Open a meter under this one; without terms it is taken as it is, and made without limits if it is not there.

        Raises:
            As :meth:`open_root`.
        """
        path = f"{self.path}/{checked_name(name)}"
        if terms is None:
            agreed = self.store.find_terms(path) or self.store.open_meter(path, Terms())
        else:
            agreed = _agreed(self.store, path, terms)
        priced, local = self.priced or agreed.limits.usd is not None, self.local or _limits_local_work(agreed)
        return MeterHandle(self.store, self.unsettled, path, agreed, priced, local)


def _limits_local_work(terms: Terms) -> bool:
    limits = terms.limits
    return any(limit is not None for limit in (limits.answers, limits.answer_tokens, limits.seconds))


def _agreed(store: BudgetStore, path: str, terms: Terms) -> Terms:
    """The terms of the meter, which must be those it is opened with."""
    found = store.open_meter(path, terms)
    if found != terms:
        raise BadLimit(
            f"Budget {path!r} exists with other limits: {_described(found)}, not {_described(terms)}.",
            hint="Raise them with Budget.extend(), or take another name.",
        )
    return found


def _described(terms: Terms) -> str:
    parts = [
        f"{unit}={_text(unit, value)}" for unit, value in zip(UNITS, terms.limits, strict=False) if value is not None
    ]
    kept = [f"{unit}={_text(unit, value)}" for unit, value in zip(UNITS, terms.keep, strict=False) if value]
    if kept:
        parts.append(f"reserve_for_final=Charge({', '.join(kept)})")
    if terms.window:
        parts.append(str(terms.window))
    return ", ".join(parts) or "none"


def _text(unit: str, value: int) -> str:
    return f"{value / 1e6:g}" if unit == "seconds" else str(public(unit, value))
