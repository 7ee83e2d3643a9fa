"""Several processes train one selector: each scores its part of a batch, gradients are added up.

``torchrun --nproc_per_node 2 -m s2t_agents.cli train config.toml`` starts two; so does ``accelerate launch`` if it is
configured for several. Without a launcher there is one, and nothing here costs anything. The sum of the parts is the
gradient of the whole batch, so the number of processes does not change what is learnt (beyond the order of additions).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


class Workers:
    """This process among its siblings.

    Attributes:
        rank: of this process, from 0.
        count: of processes.
    """

    def __init__(self) -> None:
        self.rank, self.count = 0, 1
        self.device: torch.device | None = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState  # type: ignore[import-untyped]

            state = PartialState(cpu=not torch.cuda.is_available())
            self.rank, self.count, self.device = state.process_index, state.num_processes, state.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and draws bars."""
        return self.rank == 0

    def part(self, units: Sequence[int]) -> Sequence[int]:
        """What this process works on."""
        return units[self.rank :: self.count]

    def add_up(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Sums over all processes."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(total)
        summed: list[float] = total.tolist()
        return summed

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Every process ends with the same gradients; one that had nothing to do gives zeros."""
        if self.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradient: Tensor = parameter.grad
            torch.distributed.all_reduce(gradient)

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            torch.distributed.barrier()
