"""Prompts that are being read, or answered, right now: the part that a new prompt shares with one of them is forked.

    agent 1   system tools | question 1           reads all of it
    agent 2   system tools | question 2           waits for "system tools", forks it, reads question 2

Past turns are cached when their generation ends (``prefix_cache``); without this, agents that start together would each
read the same system prompt. Waiting costs nothing: reading the same tokens beside the reader would take as long. The
tokens of a KV cache never change while its generation goes on, so its front can be forked at any time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..backends.base import SequenceCache
from ..backends.deadline import Deadline
from ..fork_safety import hold_while_forking, renew_in_child
from .prefix_cache import SHORTEST, PrefixCache, common_prefix
from .waits import Wait, Waiting

POLL_S = 0.002
"""Seconds between looks at how far a reader has come, at first."""

POLL_SHARE = 0.05
"""And later, as a share of the time that was waited: more looks would take the reader's own time."""

START_S = 0.1
"""Seconds that a generation has to begin reading; one whose consumer pauses before that is not waited for."""


@dataclass(eq=False)
class RunningPrefix:
    """One prompt and the KV cache that it is read into.

    Attributes:
        scope: as in ``PrefixCache``.
        ids: ``[n]``, all of the prompt.
        cache: None until its generation has one.
        reading: a forward over its tokens is under way or queued.
        entered: when its generation began, by ``time.monotonic``.
        over: its generation has ended.
    """

    scope: str | None
    ids: NDArray[np.int64]
    cache: SequenceCache | None = None
    reading: bool = False
    entered: float = field(default_factory=time.monotonic)
    over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> None:
        """Its generation reads tokens in this block."""
        self.reading = True

    def __exit__(self, *exc: object) -> None:
        self.reading = False

    @property
    def read(self) -> int:
        """Tokens whose forward is done."""
        return self.cache.read if self.cache is not None else 0

    def offers(self, wanted: NDArray[np.int64]) -> int:
        """Leading tokens of ``wanted`` that it holds, or will soon."""
        length = common_prefix(self.ids, wanted)
        return length if self.coming else min(length, self.read)

    @property
    def coming(self) -> bool:
        """Whether more tokens are being read, or will be in a moment."""
        return self.reading or time.monotonic() < self.entered + START_S

    def fork(self, length: int) -> SequenceCache | None:
        """The KV cache of the first ``length`` tokens; None where they are not all read, or dropped after a failure."""
        if self.cache is None or self.cache.read < length:
            return None
        fork = self.cache.fork(length)
        return fork if fork.read == length else None


class PrefixWait(Wait):
    """Until so many tokens of a prompt under way are read, or are not to be expected for now.

    Args:
        prefix: whose generation reads them.
        length: how many.
        deadline: of the generation that waits.
    """

    def __init__(self, prefix: RunningPrefix, length: int, deadline: Deadline | None = None) -> None:
        self._prefix, self._length, self._deadline = prefix, length, deadline

    @property
    def over(self) -> bool:
        """Whether there is nothing to wait for any more."""
        read = self._prefix.over.is_set() or not self._prefix.coming or self._prefix.read >= self._length
        return read or (self._deadline is not None and self._deadline.left_s() <= 0)

    def block(self) -> None:
        """Poll, at growing intervals."""
        started = time.monotonic()
        while not self.over:
            self._prefix.over.wait(max(POLL_S, POLL_SHARE * (time.monotonic() - started)))


class RunningPrefixes:
    """The prompts of all generations that run on one model. Safe under threads.

    Args:
        cache: of generations that have ended; with a limit of 0 bytes nothing is shared here either.
        shares: see ``Capabilities.fork_while_running``.
    """

    def __init__(self, cache: PrefixCache, *, shares: bool) -> None:
        self._cache, self._shares = cache, shares
        self._entries: list[RunningPrefix] = []
        self._lock = threading.RLock()  # garbage collection may end a generation inside a block of ours
        hold_while_forking(self, "_lock")
        renew_in_child(self._forget)

    def __len__(self) -> int:
        return len(self._entries)

    def enter(
        self, ids: Sequence[int], scope: str | None, deadline: Deadline | None = None
    ) -> Waiting[tuple[RunningPrefix, SequenceCache | None, int]]:
        """A generation begins; waits while another reads a longer part of its prompt than the prefix cache holds.

        Args:
            ids: the prompt; at least its last token is left to be read.
            scope: whose generations may be shared with.
            deadline: of the generation; ends its wait.

        Returns:
            What ``leave`` wants at its end, and a fork of the longest common prefix with its tokens; None and 0 where
            nothing fits.

        Raises:
            S2TError: of the deadline.
        """
        prompt = np.asarray(ids, dtype=np.int64)
        entry = RunningPrefix(scope, prompt)
        while True:
            with self._lock:
                best, length = self._longest(prompt[:-1], scope)
                if best is None or length < self._cache.longest(prompt, scope) + SHORTEST:
                    self._entries.append(entry)
                    break
                fork = best.fork(length)
                if fork is not None:
                    self._entries.append(entry)
                    return entry, fork, length
            yield PrefixWait(best, length, deadline)
            if deadline is not None and deadline.left_s() <= 0:
                deadline.check()
        found = self._cache.take if self._shares else self._cache.match  # others may want the front of it meanwhile
        try:
            return entry, *found(prompt, scope)
        except BaseException:
            self.leave(entry)
            raise

    def leave(self, entry: RunningPrefix) -> None:
        """Its generation has ended; prompts that waited for it look elsewhere."""
        with self._lock:
            self._entries = [each for each in self._entries if each is not entry]  # gone already in a forked child
        entry.over.set()

    def _forget(self) -> None:
        """In a forked child: the threads of these generations did not come along."""
        self._entries = []

    def _longest(self, wanted: NDArray[np.int64], scope: str | None) -> tuple[RunningPrefix | None, int]:
        """The entry that shares most of a prompt; among equals the one that has read most of it."""
        mine = [(entry.offers(wanted), entry.read, entry) for entry in tuple(self._entries) if entry.scope == scope]
        if not (mine and self._shares and self._cache.limit_bytes):
            return None, 0
        length, _, entry = max(mine, key=lambda each: each[:2])
        return entry, length
