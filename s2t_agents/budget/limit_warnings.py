"""Warnings: a callback, once for each limit of which a share is spent."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal

from ..errors import BadLimit, StoreUnavailable
from ..types import LimitWarning
from . import money
from .meter_handle import MeterHandle
from .quantities import NOTHING
from .state import BudgetState, Number

WARN_AT = 0.8
"""The share of a limit at which a warning comes, by default."""

_log = logging.getLogger(__name__)

OnWarning = Callable[[LimitWarning], None]


def checked_share(share: float) -> float:
    """The share of a limit at which a warning comes; ``BadLimit`` where it is none."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise BadLimit(f"warn_at={share!r} is not a share of a limit.", hint="Give 0.8 for 80%, 1 at most.")
    return share


@dataclass(frozen=True)
class Warner:
    """The callback, and the share of a limit at which it is called.

    Args:
        tell: called in the thread that settles; what it raises is logged.
        share: of a limit, above 0 and at most 1 (see :func:`checked_share`).
    """

    tell: OnWarning
    share: float
    _told: set[tuple[str, str]] = field(default_factory=set, init=False, repr=False, compare=False)

    def look(self, meter: MeterHandle) -> None:
        """Call ``tell`` for the limits of a meter of which the share is spent; where the store is away, the next time.

        The store keeps that it was called, so that one process of all calls it. A raised limit, and a new window, can
        warn again.
        """
        try:
            state = meter.store.read_state(meter.path)
            for unit, limit in state.limit.items():
                spent = state.spent[unit]
                if spent is None or not limit or self._until_due(limit, spent) > 0:
                    continue
                once = f"warned of {unit} {limit} {state.window} at {self.share:g}"
                if (meter.path, once) not in self._told:
                    first = meter.store.extend(meter.path, NOTHING, once)
                    self._told.add((meter.path, once))  # not before: a store that was away is asked again
                    if first:
                        self._tell(LimitWarning(meter.path, unit, limit, spent))
        except StoreUnavailable as error:
            _log.debug("whether a warning is due is not known: %s", error)

    def seconds_to(self, state: BudgetState) -> float | None:
        """Seconds until a deadline's warning is due; None where it has none, or was."""
        limit, passed = state.limit.get("seconds"), state.spent.get("seconds")
        if not limit or passed is None:
            return None
        due = self._until_due(limit, passed)
        return float(due) if due > 0 else None

    def _until_due(self, limit: Number, spent: Number) -> Decimal:
        """How much more may be spent of a limit before its warning is due, exactly; a float means what it prints as."""
        share, whole, used = (Decimal(str(number)) for number in (self.share, limit, spent))
        return money.subtract(money.multiply(share, whole), used)

    def _tell(self, warning: LimitWarning) -> None:
        try:
            self.tell(warning)
        except Exception:  # noqa: BLE001 - a warning never takes an answer down
            _log.exception("on_warning failed for %s", warning)
