"""Prompts that are being read, or answered, right now: who begins alike takes a copy of the part they share.

    agent 1   system tools | question 1           reads all of it
    agent 2   system tools | question 2           waits for "system tools", copies it, reads question 2

Past turns are kept when their generation ends (``prefix_cache``); without this, agents that start together would each
read the same system prompt. To wait costs nothing: reading the same tokens beside the reader would take as long. The
tokens of a KV never change while its generation goes on, so a copy of its front can be taken at any time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..backends.torch.kv_cache import KVCache
from ..fork_safety import hold_while_forking, renew_in_child
from .prefix_cache import WORTH, PrefixCache, common

LOOK_S = 0.002
"""Seconds between looks at how far a reader has come, at first."""

LATE = 0.05
"""And later, as a share of the time that was waited: more looks would take the reader's own time."""

START_S = 0.1
"""Seconds that a generation has to begin reading; one whose consumer pauses before that is not waited for."""


@dataclass(eq=False)
class Live:
    """One prompt and the KV that it is read into.

    Attributes:
        scope: as in ``PrefixCache``.
        ids: ``[n]``, all of the prompt.
        cache: None until its generation has one.
        reading: a forward over its tokens is under way or wanted.
        begun: when it was entered, as ``time.monotonic`` says.
        over: its generation has ended.
    """

    scope: str | None
    ids: NDArray[np.int64]
    cache: KVCache | None = None
    reading: bool = False
    begun: float = field(default_factory=time.monotonic)
    over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> None:
        """Its generation reads tokens in this block."""
        self.reading = True

    def __exit__(self, *exc: object) -> None:
        self.reading = False

    @property
    def read(self) -> int:
        """Tokens that every layer holds."""
        return self.cache.read if self.cache is not None else 0

    def offers(self, wanted: NDArray[np.int64]) -> int:
        """Leading tokens of ``wanted`` that it holds, or will soon."""
        length = common(self.ids, wanted)
        return length if self.coming else min(length, self.read)

    @property
    def coming(self) -> bool:
        """Whether more tokens are being read, or will be in a moment."""
        return self.reading or time.monotonic() < self.begun + START_S

    def wait_for(self, length: int) -> None:
        """Returns when so many tokens are read, or are not to be expected for now."""
        started = time.monotonic()
        while self.coming and self.read < length:
            if self.over.wait(max(LOOK_S, LATE * (time.monotonic() - started))):
                return

    def copy(self, length: int) -> KVCache | None:
        """The KV of the first ``length`` tokens; None where they are not all read, or forgotten after a failure."""
        if self.cache is None or self.cache.read < length:
            return None
        copy = self.cache.clone(length)
        return copy if copy.read == length else None


class LivePrefixes:
    """The prompts of all generations that go on over one model. Safe under threads.

    Args:
        past: what is kept of generations that have ended; a limit of 0 bytes shares nothing here either.
        kind: of the model's KV.
    """

    def __init__(self, past: PrefixCache, kind: type[KVCache]) -> None:
        self._past, self._kind = past, kind
        self._entries: list[Live] = []
        self._lock = threading.RLock()  # garbage collection may end a generation inside a block of ours
        hold_while_forking(self, "_lock")
        renew_in_child(self._forget)

    def __len__(self) -> int:
        return len(self._entries)

    def enter(self, ids: Sequence[int], scope: str | None) -> tuple[Live, KVCache | None, int]:
        """A generation begins; waits for whoever is reading a longer part of its prompt than the past holds.

        Args:
            ids: the prompt; at least its last token is left to be read.
            scope: whose generations may be looked at.

        Returns:
            What ``leave`` wants at its end, and a copy of the KV of the longest common prefix with its tokens; None
            and 0 where nothing fits.
        """
        prompt = np.asarray(ids, dtype=np.int64)
        entry = Live(scope, prompt)
        while True:
            with self._lock:
                best, length = self._longest(prompt[:-1], scope)
                if best is None or length < self._past.longest(prompt, scope) + WORTH:
                    self._entries.append(entry)
                    break
                copy = best.copy(length)
                if copy is not None:
                    self._entries.append(entry)
                    return entry, copy, length
            best.wait_for(length)
        return entry, *self._past.take(prompt, scope)

    def leave(self, entry: Live) -> None:
        """Its generation has ended; who waited for it looks elsewhere."""
        with self._lock:
            self._entries = [each for each in self._entries if each is not entry]  # gone already in a forked child
        entry.over.set()

    def _forget(self) -> None:
        """Nobody goes on reading here: those threads did not come along into the child."""
        self._entries = []

    def _longest(self, wanted: NDArray[np.int64], scope: str | None) -> tuple[Live | None, int]:
        """Who shares most of a prompt; among equals who has read most of it."""
        mine = [(entry.offers(wanted), entry.read, entry) for entry in tuple(self._entries) if entry.scope == scope]
        if not (mine and self._kind.front_stays and self._past.limit_bytes):
            return None, 0
        length, _, entry = max(mine, key=lambda each: each[:2])
        return entry, length
