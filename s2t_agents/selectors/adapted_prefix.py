"""KV of a conversation as the SLM reads it with an adapter on: kept between selections, caught up at each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..backends.torch.lora import Lora
from ..proposal import Proposal
from ..scheduling.idle_sequences import IdleSequences
from ..scheduling.language_model import LanguageModel
from ..scheduling.sequence import TokenSequence

IDLE = 4
"""Adapted KV caches kept between selections, one per conversation going on."""


class AdaptedPrefixes:
    """The adapted KV of a few conversations.

    Args:
        base: the SLM.
        lora: on while a prefix is read.

    Attributes:
        idle: what is kept between selections.
    """

    def __init__(self, base: LanguageModel, lora: Lora) -> None:
        self._base, self._lora = base, lora
        self.idle = IdleSequences(IDLE)

    @contextmanager
    def caught_up(self, proposal: Proposal) -> Iterator[TokenSequence]:
        """The proposal's prefix, read with the adapter on, which stays on in the block."""
        ids, scope = proposal.prefix.ids, proposal.prefix.scope
        prefix = self.idle.take(ids, scope, sharing=len(ids) // 2) or TokenSequence(self._base, scope)
        with self._base.lock, self._lora.on(self._base.model):
            prefix.compute = proposal.prefix.compute  # its KV is another, its time is the generation's
            prefix.move_to(ids)
            yield prefix
        self.idle.put(prefix)
