"""A decode step that the device works at, and each sequence's row of it.

The device runs one step ahead of the host (``decode_graphs``): outputs are handed on before they are there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...statistics import LogitStatistics, statistics_of_rows


class InFlightStep:
    """A step of some rows that the device works at.

    Args:
        logits: ``[n, V]``, fp32.
        hidden: ``[n, H]``.
        seen: ``[n, 3]``, see ``statistics``; on its way to the host at once.
        start: what ``mark`` gave just before; None where there is no device beside the host.
        sequences: how many have a part in it.

    Attributes:
        alone_s: seconds from its beginning in which no caller waited for the device.
    """

    def __init__(
        self, logits: Tensor, hidden: Tensor, seen: Tensor, start: torch.cuda.Event | None, sequences: int
    ) -> None:
        self.logits, self.hidden, self.seen, self._sequences = logits, hidden, seen, sequences
        self.alone_s = 0.0
        self._host = seen
        if start is not None:
            self._host = torch.empty(seen.shape, dtype=seen.dtype, pin_memory=True).copy_(seen, non_blocking=True)
        self._start, self._end = start, mark(seen)

    @cached_property
    def statistics_of_rows(self) -> list[LogitStatistics]:
        """Of each row; waits for this step, and not for what was begun after it."""
        if self._end is not None:
            self._end.synchronize()
        return statistics_of_rows(self._host)

    @property
    def device_s(self) -> float:
        """Seconds that the device was at it, once it has arrived; 0 where that is the host's own time."""
        if self._start is None or self._end is None:
            return 0.0
        return float(self._start.elapsed_time(self._end)) / 1000

    @property
    def device_alone_s(self) -> float:
        """Each sequence's share of the device's seconds while no caller waited, once the step is done."""
        return min(self.device_s, self.alone_s) / self._sequences


def mark(like: Tensor) -> torch.cuda.Event | None:
    """A point in a tensor's device's work, on CUDA."""
    if not like.is_cuda:
        return None
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(like.device))  # where another device is the current one, too
    return event


@dataclass(eq=False)
class InFlightRow:
    """One sequence's part of a step under way.

    Attributes:
        step: which.
        row: of the step.
        position: where its token stands.
        token: which it is; None until that is known.
    """

    step: InFlightStep
    row: int
    position: int
    token: int | None = None

    @property
    def output(self) -> tuple[Tensor, Tensor]:
        """Logits ``[V]`` and last hidden state ``[H]``, on the device, maybe still to come."""
        return self.step.logits[self.row], self.step.hidden[self.row]
