"""One sequence: token ids, their KV cache, and the model's output after the last token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Self, cast

import torch
from torch import Tensor

from ..backends.base import BestLogits, Need, ScoreCandidates, ScoreTree, SequenceCache
from ..backends.deadline import Deadline
from ..backends.statistics import LogitStatistics
from .compute_time import ComputeTime
from .language_model import LanguageModel
from .prefix_cache import common_prefix
from .requests import AppendRequest, ScoreRequest, TreeRequest
from .running_prefixes import RunningPrefix
from .waits import Forwards, Waiting, finish


class TokenSequence:
    """Grows token by token; ``logits`` and ``hidden`` are those after its last token.

    Not thread-safe: one generation owns it. As a context manager it gives its KV cache to the prefix cache in the end,
    if that is where it came from. Methods that run the model are computations with waits in them; ``append`` blocks.

    Args:
        model: reads the tokens.
        scope: whose conversation it is: KV caches are shared within one scope only.
        lora: adapter that is on at all its tokens.
        deadline: ends the reading of many tokens.

    Attributes:
        ids: its tokens.
        logits: ``[V]``, fp32.
        hidden: ``[H]``.
        cache: its KV cache.
        compute: the share of the model's compute time that went into this sequence and its candidates.

    Raises:
        ConfigError: an adapter that the backend cannot put on.
    """

    def __init__(
        self,
        model: LanguageModel,
        scope: str | None = None,
        lora: Any | None = None,
        deadline: Deadline | None = None,
    ) -> None:
        model.require(*_needed_by(lora))
        self.model, self.scope, self.lora, self._deadline = model, scope, lora, deadline
        self.ids: list[int] = []
        self._logits_at: int | None = 0
        """How many tokens the logits are after; None while a forward reads more, and after one that was interrupted."""
        self.logits: Tensor = torch.empty(0)
        self.hidden: Tensor = torch.empty(0)
        self.compute = ComputeTime()
        self.cache = model.new_cache()
        self._running: RunningPrefix | None = None

    @classmethod
    def from_prefix_cache(
        cls, model: LanguageModel, prompt: Sequence[int], scope: str | None = None, deadline: Deadline | None = None
    ) -> Waiting[Self]:
        """A sequence that starts with the longest cached prefix of ``prompt``.

        Args:
            model: whose prefix cache is used.
            prompt: token ids; at least the last of them is left to be read.
            scope: see ``PrefixCache``.
            deadline: of the generation.

        Raises:
            S2TError: of the deadline.
        """
        sequence = cls(model, scope, deadline=deadline)
        if model.capabilities.truncation:  # recurrent states cannot be cut to a common prefix
            running, cache, length = yield from model.running.enter(prompt, scope, deadline)
            if cache is not None:
                sequence.cache, sequence.ids = cache, list(prompt[:length])
            running.cache, sequence._running = sequence.cache, running
        return sequence

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if self._running is None:
            self.close()
            return
        try:
            self.model.scheduler.generation_ended(self.cache)
            if self.cache.length != len(self) and kind is not GeneratorExit:  # interrupted between two chunks
                self.cache.truncate(len(self))  # which may wait for a forward: garbage collection must not
            if self.cache.length == len(self):
                self.model.prefix_cache.insert(self.ids, self.cache, self.scope)
            else:
                self.close()
        finally:
            self.model.running.leave(self._running)

    def __len__(self) -> int:
        return len(self.ids)

    def append(self, ids: Sequence[int]) -> None:
        """Append tokens (at least one); ``logits`` and ``hidden`` move to the new end."""
        finish(self.appending(ids))

    def appending(self, ids: Sequence[int]) -> Waiting[None]:
        """``append``, to wait for.

        Raises:
            S2TError: of the deadline, between two chunks; what was read of these tokens is forgotten.
        """
        with self._running or nullcontext():
            request = AppendRequest(torch.tensor(ids), self.cache, self.compute, self.lora, self._deadline)
            self._logits_at = None
            yield Forwards(self.model.scheduler, [request])
            while request.expired and self._deadline is not None:
                try:
                    self._deadline.check()
                except BaseException:
                    self.cache.truncate(len(self))
                    raise
                request.renew()
                yield Forwards(self.model.scheduler, [request])
            self.logits, self.hidden = request.result()
        self.ids += ids
        self._logits_at = len(self)

    def ensure_legal_logits(self, allowed: Tensor) -> None:
        """Request logits of ``allowed`` ``[V]`` (bool) tokens where a backend without all logits has none of them."""
        if not self.model.capabilities.all_logits and not (self.logits[allowed] > -torch.inf).any():
            self.logits = cast(BestLogits, self.model.backend).among(self.cache, allowed, self._deadline)

    @property
    def statistics(self) -> LogitStatistics | None:
        """Of the logits, where the forward has computed them on the way."""
        return self.cache.statistics()

    def common_prefix(self, ids: Sequence[int]) -> int:
        """How many leading tokens this sequence and ``ids`` share."""
        return common_prefix(self.ids, ids)

    def moving_to(self, ids: Sequence[int]) -> Waiting[int]:
        """Become the sequence ``ids``: cut back to the common prefix, read only the rest.

        Returns:
            Tokens that were computed; at least one where ``ids`` is another sequence, since the logits at its end are
            wanted.
        """
        if self._stands_at(ids):
            return 0
        keep = self._truncate(min(self.common_prefix(ids), len(ids) - 1))
        yield from self.appending(ids[keep:])
        return len(ids) - keep

    def _stands_at(self, ids: Sequence[int]) -> bool:
        """Whether it is ``ids`` with the logits at their end: not after a cut, or a forward that was interrupted."""
        return self.ids == list(ids) and self._logits_at == len(self)

    def scoring_candidates(self, candidates: Tensor, lora: Any | None = None) -> Waiting[Tensor]:
        """Last hidden state ``[K, H]`` after each of the candidates ``[K]``, as if it alone had followed the sequence,
        which stays as it is. One forward; the output layer is not run.

        Args:
            candidates: token ids.
            lora: adapter that is on at the candidates only; None scores them with the base model.

        Raises:
            ConfigError: the backend cannot do that.
        """
        self.model.require("candidate_scoring", *_needed_by(lora))
        request = ScoreRequest(ScoreCandidates(candidates, self.cache, len(self), lora), self.compute)
        yield Forwards(self.model.scheduler, [request])
        return request.result()

    def moving_to_tree(self, ids: Sequence[int], tree: Sequence[int], parents: Sequence[int]) -> Waiting[Tensor]:
        """``moving_to``, and in the same forward the logits after every token of a tree that follows.

        Args:
            ids: what the sequence becomes.
            tree: ``[N]`` tokens after it, of which nothing is kept.
            parents: ``[N]``: place of the token before each; -1 for the end of ``ids``.

        Returns:
            Logits ``[1 + N, V]``: at the end of ``ids``, then after each token of the tree.
        """
        if not tree:
            yield from self.moving_to(ids)
            return self.logits[None]
        if not self.model.capabilities.tree_scoring:
            yield from self.moving_to(ids)
            return (yield from self._by_forks(tree, parents))
        requests: list[AppendRequest | TreeRequest] = []
        append = None
        if not self._stands_at(ids):
            keep = self._truncate(min(self.common_prefix(ids), len(ids) - 1))
            append = AppendRequest(torch.tensor(ids[keep:]), self.cache, self.compute)
            requests.append(append)
            self._logits_at = None
        work = ScoreTree(torch.tensor(tree), torch.tensor(parents), self.cache, len(ids))
        scored = TreeRequest(work, append, self.compute)
        yield Forwards(self.model.scheduler, [*requests, scored])
        if append is not None:
            self.logits, self.hidden = append.result()
            self.ids = list(ids)
            self._logits_at = len(self)
        return torch.cat([self.logits[None], scored.result()])

    def _by_forks(self, tree: Sequence[int], parents: Sequence[int]) -> Waiting[Tensor]:
        """Logits ``[1 + N, V]`` where the backend reads no trees: every token goes on a fork of the one before it."""
        caches: dict[int, SequenceCache] = {-1: self.cache}
        rows: dict[int, Tensor] = {-1: self.logits}
        try:
            while waiting := [at for at in range(len(tree)) if at not in rows and parents[at] in rows]:  # one depth
                for at in waiting:
                    caches[at] = caches[parents[at]].fork(caches[parents[at]].length)
                requests = [AppendRequest(torch.tensor([tree[at]]), caches[at], self.compute) for at in waiting]
                yield Forwards(self.model.scheduler, requests)
                rows |= {at: request.result().logits for at, request in zip(waiting, requests, strict=True)}
        finally:
            for at, cache in caches.items():
                if at >= 0:
                    cache.close()
        return torch.stack([rows[at] for at in range(-1, len(tree))])

    @contextmanager
    def forks(self, count: int) -> Iterator[Forks]:
        """So many copies, to be continued apart from this sequence; their compute time is on its account."""
        forks = Forks(self, count)
        try:
            yield forks
        finally:
            forks.close()
            self.model.scheduler.generation_ended(forks)

    def close(self) -> None:
        """Give the KV cache back."""
        self.cache.close()

    def _truncate(self, length: int) -> int:
        """Forget everything after ``length`` tokens; returns how many are really kept."""
        if self._logits_at == len(self) == length:
            return length
        if not self.model.capabilities.truncation:
            self.cache.close()
            self.cache, self.ids = self.model.new_cache(), []
            self._logits_at = 0
            return 0
        self.cache.truncate(length)
        del self.ids[length:]
        return length


def _needed_by(lora: Any | None) -> tuple[Need, ...]:
    return () if lora is None else ("candidate_lora",)


class Forks:
    """Several continuations of one sequence, each on a KV cache of its own.

        cache ──forked K times──> a1 | a2 ...     one forward appends a token to each
                                  b1 | b2 ...

    Args:
        sequence: stays as it is.
        count: K.
    """

    def __init__(self, sequence: TokenSequence, count: int) -> None:
        self._model, self._compute = sequence.model, sequence.compute
        self._caches = [sequence.cache.fork(len(sequence)) for _ in range(count)]

    def appending(self, ids: Sequence[int | None]) -> Waiting[list[Tensor | None]]:
        """Append a token to each, ``[K]``; logits ``[V]`` (fp32) after it. None leaves a continuation as it is."""
        requests = [
            AppendRequest(torch.tensor([token]), cache, self._compute) if token is not None else None
            for token, cache in zip(ids, self._caches, strict=True)
        ]
        yield Forwards(self._model.scheduler, [request for request in requests if request is not None], self)
        return [request.result().logits if request is not None else None for request in requests]

    def close(self) -> None:
        """Give the KV caches back."""
        for cache in self._caches:
            cache.close()
