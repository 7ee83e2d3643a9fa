"""Several continuations of one prefix, each in a row of its own; the prefix stays as it is.

prefix KV ──copied K times──> a1 | a2 ...     one forward appends a token to each
                              b1 | b2 ...
"""

from __future__ import annotations

import time

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .compute_time import Meter
from .cpu_threads import together, wanted
from .language_model import LanguageModel


class Branches:
    """K copies of a prefix's KV, read on in lockstep.

    Args:
        model: reads the tokens.
        cache: K rows of the prefix's KV, nobody else's.
        length: tokens in it.
        meter: takes the time of the forwards.
    """

    def __init__(self, model: LanguageModel, cache: Cache, length: int, meter: Meter) -> None:
        self._model, self._cache, self._length, self._meter = model, cache, length, meter

    def extend(self, ids: Tensor) -> Tensor:
        """Append a token to each, ``[K]``; logits ``[K, V]`` (fp32) after it."""
        device = self._model.device
        with self._model.lock, together(wanted()):
            started = time.monotonic()
            self._length += 1
            mask = torch.ones(len(ids), self._length, dtype=torch.long, device=device)
            logits, _ = self._model.read_rows(ids[:, None].to(device), mask, self._cache, 1)
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
            self._meter.add(time.monotonic() - started)
        return logits[:, -1]
