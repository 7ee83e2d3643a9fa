"""What a captured graph does, on the CPU: the same operations on the same memory, and no Python in between."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from s2t_agents.backends.torch.cuda.cuda_graph import Body


class Tape(TorchDispatchMode):
    """A recorder for ``cuda.cuda_graph``. Lengths, rows and masks made in Python are frozen on it."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded = 0
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, out))
        return out

    def __call__(self, body: Body) -> Body:
        self._calls = calls = []
        with self:
            outputs = body()
        self.recorded += 1

        def again() -> tuple[torch.Tensor, ...]:
            for func, args, kwargs, out in calls:
                new = func(*args, **kwargs)
                for old, value in zip(tree_leaves(out), tree_leaves(new), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != value.data_ptr():
                        old.copy_(value)
            return outputs

        return again
