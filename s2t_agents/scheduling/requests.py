"""What is wanted of the model by one caller: a step that moves a sequence on, or a look at candidates after it."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod

from torch import Tensor
from transformers.cache_utils import Cache

from ..backends.torch.compute_time import Meter
from ..backends.torch.kv_cache import KVCache
from ..backends.torch.packed_batch import Look, Outcome, Part, Segment


class Ticket(ABC):
    """One caller's wish.

    Args:
        cache: of the sequence that it is about.
        meter: takes its share of the time of every forward it takes part in.

    Attributes:
        error: what its own forward raised.
        turn: set when the caller can go on, or has to lead.
        leads: the lead is its caller's.
    """

    def __init__(self, cache: Cache, meter: Meter | None) -> None:
        self.cache, self.meter = cache, meter or Meter()
        self.error: Exception | None = None
        self.turn = threading.Event()
        self.leads = False

    @property
    @abstractmethod
    def brief(self) -> bool:
        """Whether one forward beside others settles it: a single token, or a look."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """Tokens that are still to be read."""

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether the caller can go on."""

    @abstractmethod
    def part(self, tokens: int) -> Part:
        """At most so many of them, for the next forward; a look is never cut."""

    @abstractmethod
    def went(self, part: Part, said: Outcome | Tensor) -> None:
        """A part was read."""

    @abstractmethod
    def undo(self) -> None:
        """After a failed forward: the cache is again as it was before."""


class StepTicket(Ticket):
    """Tokens to append to a cache, in parts if they are many."""

    def __init__(self, ids: Tensor, cache: Cache, meter: Meter | None = None) -> None:
        super().__init__(cache, meter)
        self._ids = ids
        self._start = self._length = int(cache.get_seq_length())
        self._outcome: Outcome | None = None

    @property
    def brief(self) -> bool:
        """One token is left."""
        return len(self._ids) == 1

    @property
    def rows(self) -> int:
        """Tokens left."""
        return len(self._ids)

    @property
    def done(self) -> bool:
        """All tokens are read, or it failed."""
        return not len(self._ids) or self.error is not None

    def part(self, tokens: int) -> Segment:
        """The next so many tokens."""
        return Segment(self._ids[:tokens], self.cache, self._length)

    def went(self, part: Part, said: Outcome | Tensor) -> None:
        """So many tokens were read."""
        assert isinstance(said, tuple)
        self._ids, self._outcome = self._ids[len(part.ids) :], said
        self._length += len(part.ids)
        if isinstance(self.cache, KVCache):
            self.cache.read = self._length
            self.meter.add(self.cache.unseen())

    def undo(self) -> None:
        """Forget what was written since the last part that went."""
        roll_back(self.cache, self._length)

    def result(self) -> Outcome:
        """What the step said; after a failure the cache is as it was before the first part."""
        if self.error is not None:
            roll_back(self.cache, self._start)
            raise self.error
        assert self._outcome is not None
        return self._outcome


class LookTicket(Ticket):
    """Candidates to be read after a prefix; its cache stays as it is."""

    brief = True

    def __init__(self, look: Look, meter: Meter | None = None) -> None:
        super().__init__(look.cache, meter)
        self._look = look
        self._hidden: Tensor | None = None

    @property
    def rows(self) -> int:
        """Candidates."""
        return len(self._look.ids)

    @property
    def done(self) -> bool:
        """They are read, or it failed."""
        return self._hidden is not None or self.error is not None

    def part(self, tokens: int) -> Look:
        """All of it."""
        return self._look

    def went(self, part: Part, said: Outcome | Tensor) -> None:
        """Keep the hidden states."""
        assert isinstance(said, Tensor)
        self._hidden = said

    def undo(self) -> None:
        """Nothing to do: a look leaves nothing behind."""

    def result(self) -> Tensor:
        """Last hidden states ``[K, H]``."""
        if self.error is not None:
            raise self.error
        assert self._hidden is not None
        return self._hidden


def roll_back(cache: Cache, length: int) -> None:
    """Forget what a failed forward may have written behind a sequence's end."""
    if isinstance(cache, KVCache):
        cache.read = min(cache.read, length)
        cache.forget_ahead()
    for layer in cache.layers:
        extra = layer.get_seq_length() - length
        if extra > 0 and layer.is_croppable:
            layer.crop(-extra)
