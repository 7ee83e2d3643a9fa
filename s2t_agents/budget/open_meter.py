"""A meter that was opened in its store: what every budget over it shares, however each of them looks at it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from s2t_agents.budget.amount import UNITS, shown
from s2t_agents.budget.owed import Owed
from s2t_agents.budget.store import BudgetStore, Terms
from s2t_agents.errors import BadLimit, ConfigError

_UNUSABLE = re.compile(r"[/\0\ud800-\udfff]")  # a separator, and lone surrogates, which not every store can hold


@dataclass(frozen=True, slots=True)
class OpenMeter:
    """One meter, found or made in its store.

    Args:
        store: where it lives.
        owed: costs of this process that could not be booked yet; one queue for a whole tree.
        path: where in the tree, as ``fleet/run/agent``.
        terms: what it was opened with.
        priced: it or one above it limits dollars.
    """

    store: BudgetStore
    owed: Owed
    path: str
    terms: Terms
    priced: bool

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @classmethod
    def root(cls, name: str, terms: Terms, store: BudgetStore) -> OpenMeter:
        """Open the first meter of a tree.

        Raises:
            ConfigError: a name that cannot be part of a path.
            BadLimit: it exists with other terms.
            StoreUnavailable: the store cannot be reached.
        """
        agreed = _agreed(store, _part(name), terms)
        return cls(store, Owed(), name, agreed, agreed.limits[0] is not None)

    def child(self, name: str, terms: Terms | None) -> OpenMeter:
        """Open a meter under this one; without terms it is taken as it is, and made without limits if it is not there.

        Raises:
            As :meth:`root`.
        """
        path = f"{self.path}/{_part(name)}"
        if terms is None:
            agreed = self.store.known(path) or self.store.open(path, Terms())
        else:
            agreed = _agreed(self.store, path, terms)
        return OpenMeter(self.store, self.owed, path, agreed, self.priced or agreed.limits[0] is not None)


def _part(name: Any) -> str:
    if not isinstance(name, str) or not name or len(name) > 200 or _UNUSABLE.search(name):
        raise ConfigError(
            f"Budget name {name!r} must be 1 to 200 characters without '/'.", hint="Name it after its agent."
        )
    return name


def _agreed(store: BudgetStore, path: str, terms: Terms) -> Terms:
    """Whoever opens a meter again must mean the same."""
    found = store.open(path, terms)
    if found != terms:
        raise BadLimit(
            f"Budget {path!r} exists with other limits: {_told(found)}, not {_told(terms)}.",
            hint="Raise them with Budget.extend(), or take another name.",
        )
    return found


def _told(terms: Terms) -> str:
    parts = [
        f"{unit}={shown(unit, value)}" for unit, value in zip(UNITS, terms.limits, strict=True) if value is not None
    ]
    if terms.micros is not None:
        parts.append(f"seconds={terms.micros / 1e6:g}")
    if any(terms.keep):
        parts.append(f"reserve_for_final={[shown(u, k) for u, k in zip(UNITS, terms.keep, strict=True)]}")
    if terms.window:
        parts.append(str(terms.window))
    return ", ".join(parts) or "none"
