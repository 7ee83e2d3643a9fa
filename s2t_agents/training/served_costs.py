"""What a collection on servers may cost and has cost: a budget in its folder, for all its processes and later runs."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from ..budget import Budget, SQLiteStore
from ..budget.state import BudgetState
from ..errors import ConfigError, UnpricedModel
from .settings import Models

FILE = "spent.db"
NAME = "collect"


@dataclass(frozen=True)
class CollectingRun:
    """One run of a collection with a model on a server; pickles, and means the same budget in every process.

    Attributes:
        folder: of the rollouts.
        usd: the most that this run may cost; None sets no limit.
        name: of the run's part of the budget.
    """

    folder: Path
    usd: Decimal | None = None
    name: str = field(default_factory=lambda: f"run-{uuid.uuid4().hex[:12]}")

    @classmethod
    def of(cls, models: Models, folder: Path, usd: Decimal | None) -> CollectingRun | None:
        """The run of a pair; None where both models are on this machine.

        Raises:
            ConfigError: a limit, and no server.
            UnpricedModel: a limit, and a server of unknown price.
        """
        if not models.served_prices:
            if usd is not None:
                raise ConfigError(f"usd is {usd}, but both models are on this machine.", hint="Leave it out.")
            return None
        for server, price in models.served_prices.items():
            if usd is not None and price is None:
                raise UnpricedModel(
                    f"this run is limited to {usd} USD, and the price of {server} is unknown.",
                    hint="Set slm_price and llm_price in [models]: {input = ..., output = ...} USD per million tokens.",
                )
        run = cls(folder, usd)
        folder.mkdir(parents=True, exist_ok=True)
        run.budget()  # a limit that cannot be meant is told before anything is asked
        return run

    def budget(self) -> Budget:
        """Where its requests are paid from."""
        whole = _whole(self.folder)
        return whole if self.usd is None else whole.child(self.name, usd=self.usd, on_exhausted="raise")


def spent_in(folder: Path) -> BudgetState | None:
    """What all runs in a folder have cost so far; None where no model was on a server."""
    return _whole(folder).state() if (folder / FILE).exists() else None


def _whole(folder: Path) -> Budget:
    return Budget(name=NAME, store=SQLiteStore(folder / FILE), on_exhausted="raise")
