"""Prompts, and what an agent's turn adds, read by captured graphs: of 16, 32, ... 1,024 tokens, filled up.

A graph takes a while to capture, so a length has to come often. The first chunk of all is read both ways, and
compared.
What cannot be read like that, for good or for now, is left to the eager path; steps keep their graphs.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from time import monotonic
from weakref import WeakKeyDictionary

import torch

from ...base import Append
from ..decoder_batch import DecoderBatch
from ..llama_decoder import close
from .cuda_graph import RETRY_S, out_of_memory
from .decode_graphs import GraphBuilder, PrefillGraph
from .in_flight import InFlightRow
from .kv_pool import KVPool, PooledKVCache

_log = logging.getLogger(__name__)

SHORTEST, LONGEST = 16, 1024
"""Tokens of a chunk that a graph reads."""

OFTEN = 4
"""Chunks of about one length, after which a graph of it is worth its capture."""

LIMIT_BYTES = 256 * 2**20
"""Of one layer's keys and values as all query heads see them: what a graph keeps for good."""


def filled(ids: Sequence[int]) -> int:
    """Tokens of the body that reads them, and columns of the row that are written."""
    return 1 if len(ids) == 1 else max(SHORTEST, 1 << (len(ids) - 1).bit_length())


class PrefillGraphs:
    """Reads chunks over KV pools. Used under the model's lock.

    Args:
        eager: the eager path, which the first graph is compared with.
        builder: how graphs are made.
        often: see ``OFTEN``.
    """

    def __init__(self, eager: DecoderBatch, builder: GraphBuilder, often: float = OFTEN) -> None:
        self.eager, self._builder, self.often = eager, builder, often
        self._known: WeakKeyDictionary[KVPool, dict[int, PrefillGraph]] = WeakKeyDictionary()
        self._wanted: Counter[int] = Counter()
        """How often chunks of about each length were."""
        self._tried, self._resumes = False, 0.0

    @property
    def sizes(self) -> list[int]:
        """Tokens of each graph."""
        return [size for each in self._known.values() for size in each]

    def clear(self) -> None:
        """All graphs are made anew."""
        self._known.clear()

    def worth(self, tokens: int) -> bool:
        """Whether a graph of so many tokens, at least 2, is used, or captured."""
        if tokens > LONGEST or monotonic() < self._resumes:
            return False
        about = tokens.bit_length()
        self._wanted[about] += 1
        return self._wanted[about] > self.often

    def read(self, pool: KVPool, row: int, cache: PooledKVCache, ids: Sequence[int], length: int) -> InFlightRow | None:
        """Begin to read a chunk; None, and nothing has changed, where the eager path has to.

        Args:
            pool: where the sequence lies.
            row: and in which row.
            cache: the sequence.
            ids: the tokens.
            length: tokens before them.
        """
        if cache.in_flight is not None:  # it was not wanted; nor, maybe, would be the step after this chunk
            cache.in_flight, cache.hits = None, 0
        if self._builder.llama_decoder.seen_bytes(pool.capacity) > LIMIT_BYTES:
            return None
        known = self._known.setdefault(pool, {})
        try:
            if filled(ids) not in known:
                known[filled(ids)] = PrefillGraph(self._builder, pool, filled(ids))
            in_flight = known[filled(ids)].begin(row, ids, length)
            if self._tried or self._agrees(in_flight, cache, ids, length):
                self._tried = True
                return in_flight
            reason = "their logits are not those of the eager way"
        except RuntimeError as error:
            if out_of_memory(error):
                self._resumes = monotonic() + RETRY_S
                _log.warning("for %.0f s prompts go on without captured graphs: %s", RETRY_S, error)
                return None
            reason = str(error)
        self.often = math.inf
        self._known.clear()
        _log.warning("prompts go on without captured graphs: %s", reason)
        return None

    def _agrees(self, in_flight: InFlightRow, cache: PooledKVCache, ids: Sequence[int], length: int) -> bool:
        """Whether the eager path computes the same."""
        logits = in_flight.step.logits[0]
        try:
            ((eager, _),) = self.eager([Append(torch.tensor(ids, device=logits.device), cache, length)])
        finally:
            cache.truncate(length)
        return close(logits, eager, in_flight.step.hidden.dtype)
