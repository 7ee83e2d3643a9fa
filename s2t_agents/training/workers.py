"""Several processes train one selector: each scores its part of a batch, gradients are added up.

They are the config's ``processes`` (a crew, see ``joined``), or those that a launcher started: ``torchrun
--nproc_per_node 2 -m s2t_agents.cli train config.toml`` starts two; so does ``accelerate launch`` if it is configured
for several. With one process nothing here costs anything. The sum of the parts is the gradient of the whole batch, so
the number of processes does not change what is learnt (beyond the order of additions).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Workers:
    """This process among its siblings.

    Args:
        rank: of this process among ``count`` that have found each other; None: as a launcher says, alone without one.
        count: of processes.

    Attributes:
        rank: of this process, from 0.
        count: of processes.
    """

    def __init__(self, rank: int | None = None, count: int = 1) -> None:
        self.rank, self.count = rank or 0, count
        self.device: torch.device | None = None
        if rank is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState  # type: ignore[import-untyped]

            state = PartialState(cpu=not torch.cuda.is_available())
            self.rank, self.count, self.device = state.process_index, state.num_processes, state.device

    @classmethod
    @contextmanager
    def joined(cls, rank: int, count: int, port: int) -> Iterator[Workers]:
        """This process as one of a crew's, for as long as the block lasts; waits until all are there.

        Args:
            rank: of this process.
            count: of processes.
            port: of the loopback address, over which they find each other.
        """
        address = f"tcp://127.0.0.1:{port}"
        torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=count)
        try:
            yield cls(rank, count)
        finally:
            torch.distributed.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and draws bars."""
        return self.rank == 0

    def part(self, units: Sequence[T]) -> Sequence[T]:
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

    def everyones(self, mine: list[T]) -> list[T]:
        """What all processes made of their parts, in the order of the whole."""
        if self.count == 1:
            return mine
        parts: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(parts, mine)
        return [parts[at % self.count][at // self.count] for at in range(sum(map(len, parts)))]

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            torch.distributed.barrier()


def free_port() -> int:
    """A free port of the loopback address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
