"""A prefix: token ids, their KV, and what the model says after them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from ..backends.torch.candidate_overlay import cloned_rows
from ..backends.torch.compute_time import Meter
from ..backends.torch.continuations import Branches
from ..backends.torch.cpu_threads import release
from ..backends.torch.kv_cache import KVCache
from ..backends.torch.language_model import LanguageModel
from ..backends.torch.logit_statistics import Glance
from ..backends.torch.lora import Lora
from .running_prefixes import Live


class Prefix:
    """Grows token by token; ``logits`` and ``hidden`` are those after its last token.

    Not thread-safe: one generation owns it.

    Args:
        model: reads the tokens.
        scope: whose conversation it is: KV is reused within one scope only.

    Attributes:
        meter: the share of the model's time that went into this prefix and into looks past its end.
    """

    def __init__(self, model: LanguageModel, scope: str | None = None) -> None:
        self.model, self.scope = model, scope
        self.ids: list[int] = []
        self.logits: Tensor = torch.empty(0)
        self.hidden: Tensor = torch.empty(0)
        self.meter = Meter()
        self._cache = model.new_cache()
        self._live: Live | None = None

    @classmethod
    @contextmanager
    def over(cls, model: LanguageModel, prompt: Sequence[int], scope: str | None = None) -> Iterator[Prefix]:
        """A prefix that begins with what earlier turns have read of ``prompt``, and is kept for later ones at the end.

        Args:
            model: whose KV of past turns is looked through.
            prompt: token ids; at least the last of them is left to be read.
            scope: see ``PrefixCache``.
        """
        prefix = cls(model, scope)
        if not model.overlay_exact:  # recurrent states cannot be cut to a common prefix
            yield prefix
            return
        live, cache, length = model.live.enter(prompt, scope)
        if cache is not None:
            prefix._cache, prefix.ids = cache, list(prompt[:length])
        live.cache, prefix._live = prefix._cache, live
        try:
            yield prefix
        finally:
            try:
                model.owner.pause()
                if prefix._cache.get_seq_length() == len(prefix):
                    model.past.keep(prefix.ids, prefix._cache, scope)
            finally:
                model.live.leave(live)

    def __len__(self) -> int:
        return len(self.ids)

    def extend(self, ids: Sequence[int]) -> None:
        """Append tokens (at least one); ``logits`` ``[V]`` and ``hidden`` ``[H]`` move to the new end."""
        with self._live or nullcontext():
            self.logits, self.hidden = self.model.step(torch.tensor(ids), self._cache, self.meter)
        self.ids += ids

    @property
    def glance(self) -> Glance | None:
        """The logits in three numbers, where the step has brought them along."""
        return self._cache.glance(len(self)) if isinstance(self._cache, KVCache) else None

    def shared(self, ids: Sequence[int]) -> int:
        """How many leading tokens this prefix and ``ids`` have in common."""
        n = 0
        for ours, theirs in zip(self.ids, ids, strict=False):
            if ours != theirs:
                break
            n += 1
        return n

    def move_to(self, ids: Sequence[int]) -> int:
        """Become the prefix ``ids``: roll back to what is shared, read only the rest.

        Returns:
            Tokens that were computed; at least one, since the logits at the end are wanted.
        """
        if self.ids == list(ids):
            return 0
        keep = self._roll_back(min(self.shared(ids), len(ids) - 1))
        self.extend(ids[keep:])
        return len(ids) - keep

    def look_ahead(self, candidates: Tensor, lora: Lora | None = None) -> Tensor:
        """Last hidden state ``[K, H]`` after each of the candidates ``[K]``; the prefix stays as it is.

        Args:
            candidates: token ids.
            lora: corrections that are on at the candidates only.
        """
        return self.model.look_ahead(candidates, self._cache, len(self), lora, self.meter)

    @contextmanager
    def branches(self, rows: int) -> Iterator[Branches]:
        """So many copies, one row each, to be continued apart from this prefix; their time is on its meter."""
        try:
            yield Branches(self.model, cloned_rows(self._cache, rows), len(self), self.meter)
        finally:
            release()  # the threads that their forwards had

    def _roll_back(self, length: int) -> int:
        """Forget everything after ``length`` tokens; returns how many are really kept."""
        dropped = len(self) - length
        if dropped and not self.model.overlay_exact:  # recurrent states cannot be rolled back
            self._cache, self.ids = self.model.new_cache(), []
            return 0
        if dropped:
            self._cache.crop(-dropped)
            del self.ids[length:]
        return length
