"""What a caller asks of the scheduler: tokens appended to a sequence, or candidates scored after it."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from ..backends.base import Append, Output, ScoreCandidates, ScoreTree, SequenceCache, StepOutput, Work
from ..backends.deadline import Deadline
from .compute_time import ComputeTime


class ForwardRequest(ABC):
    """One caller's request.

    Args:
        cache: of the sequence that it is about.
        compute: takes its share of the time of every forward it takes part in.

    Attributes:
        caller: identifies the caller to the scheduler.
        error: what its own forward raised.
    """

    def __init__(self, cache: SequenceCache, compute: ComputeTime | None) -> None:
        self.cache, self.compute = cache, compute or ComputeTime()
        self.caller = id(cache)
        self.error: BaseException | None = None
        self._pending = threading.Lock()  # held until ``finish``; an Event costs twice as much a token
        self._pending.acquire()

    def wait(self) -> None:
        """Block until ``finish``, once."""
        self._pending.acquire()

    def finish(self) -> None:
        """The caller can go on."""
        if self._pending.locked():
            self._pending.release()

    @property
    @abstractmethod
    def single_forward(self) -> bool:
        """One forward beside others completes it: a single token, or candidates."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """Tokens that are still to be read."""

    @property
    @abstractmethod
    def done(self) -> bool:
        """All is read, or it failed."""

    @abstractmethod
    def work(self, tokens: int) -> Work:
        """At most so many tokens of it, for the next forward; candidates are never split."""

    @abstractmethod
    def complete(self, work: Work, output: Output) -> None:
        """Take the output of some of its work."""

    @abstractmethod
    def undo(self) -> None:
        """After a failed forward: the cache is again as it was before."""


class AppendRequest(ForwardRequest):
    """Tokens to append to a cache, in chunks if they are many.

    Args:
        ids: ``[T]``.
        cache: grows by T.
        compute: see ``ForwardRequest``.
        lora: adapter that is on at these tokens.
        deadline: of the generation, looked at between the chunks of a prompt.

    Attributes:
        expired: given back for its deadline, with some of its tokens read; it can be run again.
    """

    def __init__(
        self,
        ids: Tensor,
        cache: SequenceCache,
        compute: ComputeTime | None = None,
        lora: Any | None = None,
        deadline: Deadline | None = None,
    ) -> None:
        super().__init__(cache, compute)
        self._ids, self._lora, self._deadline = ids, lora, deadline
        self.expired = False
        self._start = self._length = cache.length
        self._end = self._start + len(ids)
        self._output: StepOutput | None = None

    @property
    def single_forward(self) -> bool:
        """One token is left."""
        return self._end - self._length == 1

    @property
    def rows(self) -> int:
        """Tokens left."""
        return self._end - self._length

    @property
    def done(self) -> bool:
        """All tokens are read, or it failed, or has expired."""
        return self._length == self._end or self.error is not None or self.expired

    def work(self, tokens: int) -> Append:
        """The next so many tokens."""
        read = self._length - self._start
        return Append(self._ids[read : read + tokens], self.cache, self._length, self._lora, self._deadline)

    def complete(self, work: Work, output: Output) -> None:
        """So many tokens were read."""
        assert isinstance(output, StepOutput)
        self._output = output
        self._length += len(work.ids)
        self.cache.mark_read(self._length)
        self.compute.add(self.cache.unbilled_s())

    def undo(self) -> None:
        """Forget what was written since the last chunk that was read."""
        self.cache.truncate(self._length)

    def expire(self) -> None:
        """Called while it waits for a forward: it goes back to its caller if its deadline is to be looked at.

        A single token is not worth the look.
        """
        if self._deadline is not None and not self.single_forward and self._deadline.left_s() <= 0:
            self.expired = True

    def renew(self) -> None:
        """There is time after all: it can be run again, and goes on after what is read."""
        self.expired = False
        self._pending.acquire(blocking=False)

    def result(self) -> StepOutput:
        """The output after the last token.

        Raises:
            BaseException: what the forward raised; the cache is as it was before the first chunk.
        """
        if self.error is not None:
            self.cache.truncate(self._start)
            raise self.error
        assert self._output is not None
        return self._output


class ScoreRequest(ForwardRequest):
    """Candidates to be scored after a sequence, whose cache stays as it is.

    Args:
        work: the candidates.
        compute: see ``ForwardRequest``.
    """

    single_forward = True

    def __init__(self, work: ScoreCandidates | ScoreTree, compute: ComputeTime | None = None) -> None:
        super().__init__(work.cache, compute)
        self._work = work
        self._scored: Tensor | None = None

    @property
    def rows(self) -> int:
        """Candidates, or tokens of a tree."""
        return len(self._work.ids)

    @property
    def done(self) -> bool:
        """They are scored, or it failed."""
        return self._scored is not None or self.error is not None

    def work(self, tokens: int) -> ScoreCandidates | ScoreTree:
        """All of it."""
        return self._work

    def complete(self, work: Work, output: Output) -> None:
        """Keep what was computed."""
        assert isinstance(output, Tensor)
        self._scored = output

    def undo(self) -> None:
        """Nothing to do: scoring leaves nothing behind."""

    def result(self) -> Tensor:
        """Last hidden states ``[K, H]``; of a tree, logits ``[N, V]``.

        Raises:
            BaseException: what the forward raised.
        """
        if self.error is not None:
            raise self.error
        assert self._scored is not None
        return self._scored


class TreeRequest(ScoreRequest):
    """A tree of tokens to be scored after a sequence, and after tokens that are appended to it meanwhile.

    Args:
        work: the tree; its ``length`` counts the tokens of ``after``.
        after: appends to the same cache in the same forward, or before; None where the sequence is read.
        compute: see ``ForwardRequest``.
    """

    def __init__(self, work: ScoreTree, after: AppendRequest | None, compute: ComputeTime | None = None) -> None:
        super().__init__(work, compute)
        self.after = after

    @property
    def done(self) -> bool:
        """They are scored, or it failed, or what it comes after did."""
        return super().done or (self.after is not None and self.after.error is not None)

    def result(self) -> Tensor:
        """Logits ``[N, V]``.

        Raises:
            BaseException: what the forward raised, or the one before.
        """
        if self.error is None and self.after is not None and self.after.error is not None:
            raise self.after.error
        return super().result()
