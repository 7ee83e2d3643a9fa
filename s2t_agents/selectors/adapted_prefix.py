"""KV of a conversation as the SLM reads it with an adapter on: kept between selections, caught up at each."""

from __future__ import annotations

from ..backends.torch.lora import Lora
from ..proposal import Proposal
from ..scheduling.idle_sequences import IdleSequences
from ..scheduling.language_model import LanguageModel
from ..scheduling.sequence import TokenSequence
from ..scheduling.waits import Waiting

IDLE = 64
"""Adapted KV caches kept between selections, one per conversation going on."""

IDLE_BYTES = 512 * 2**20
"""Memory for them; beyond it the oldest conversation's is read again."""


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
        self.idle = IdleSequences(IDLE, IDLE_BYTES)

    def caught_up(self, proposal: Proposal) -> Waiting[TokenSequence]:
        """The proposal's prefix, read with the adapter on; give it to ``idle`` afterwards."""
        ids, scope = proposal.prefix.ids, proposal.prefix.scope
        prefix = self.idle.take(ids, scope, sharing=len(ids) // 2) or TokenSequence(self._base, scope, self._lora)
        prefix.compute = proposal.prefix.compute  # its KV is another, its time is the generation's
        yield from prefix.moving_to(ids)
        return prefix
