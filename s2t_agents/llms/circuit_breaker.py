"""A circuit breaker: an endpoint that is down is not asked until it has had time to come back.

closed ──failures in a row, or one that is certain──> open ──cooldown──> half-open ──one question──> closed
                                                        ^                    │ fails
                                                        └────────────────────┘
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from ..errors import ConfigError, EndpointBusy, EndpointDown, EscalationFailed, OutOfTime, QuestionRefused
from ..fork_safety import hold_while_forking

State = Literal["closed", "open", "half-open"]

NOT_ITS_FAULT = (OutOfTime, QuestionRefused)
"""Failures that lie with the caller: they say nothing about the endpoint."""


class CircuitBreaker:
    """One endpoint's breaker; may be shared by all who ask the same endpoint.

    Args:
        failures: failed questions in a row that open it; an endpoint that cannot be reached opens it at once.
        cooldown_s: seconds before it is tried again, by one question alone.
        clock: seconds that never jump back.

    Raises:
        ConfigError: no failures at all, or a negative cooldown.
    """

    def __init__(
        self, *, failures: int = 3, cooldown_s: float = 30.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if failures < 1 or not cooldown_s >= 0:
            raise ConfigError(f"a breaker needs failures >= 1 and cooldown_s >= 0, not {failures} and {cooldown_s}.")
        self._limit, self._cooldown, self._clock = failures, cooldown_s, clock
        self._failed = 0
        self._opens_at: float | None = None
        self._probing = False
        self._lock = threading.Lock()
        hold_while_forking(self, "_lock")

    @property
    def state(self) -> State:
        """Whether questions pass: all of them, none, or one to try."""
        with self._lock:
            if self._opens_at is None:
                return "closed"
            return "open" if self._clock() < self._opens_at or self._probing else "half-open"

    def check(self) -> None:
        """Say at once what ``attempt`` would say.

        Raises:
            EscalationFailed: it is open.
        """
        with self._lock:
            self._refuse_if_open()

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Around one question: lets it through or not, and learns from how it ends.

        A caller that is interrupted or out of its own time, and a question that nobody could take, teach nothing.

        Raises:
            EscalationFailed: it is open.
        """
        with self._lock:
            self._refuse_if_open()
            is_probe = self._opens_at is not None
            self._probing = self._probing or is_probe
        try:
            yield
        except BaseException as error:
            with self._lock:
                self._probing = self._probing and not is_probe
                if isinstance(error, EscalationFailed) and not isinstance(error, NOT_ITS_FAULT):
                    self._learn(error, is_probe=is_probe)
            raise
        with self._lock:
            self._failed, self._opens_at, self._probing = 0, None, False

    def _refuse_if_open(self) -> None:
        if self._opens_at is None:
            return
        wait = self._opens_at - self._clock()
        if wait > 0:
            raise EscalationFailed(f"its endpoint failed before and is left alone for another {wait:.3g} s.")
        if self._probing:
            raise EscalationFailed("its endpoint failed before and is being tried by another question.")

    def _learn(self, error: EscalationFailed, *, is_probe: bool) -> None:
        self._failed += 1
        told = error.wait_s if isinstance(error, EndpointBusy) else None
        if isinstance(error, EndpointDown) or told is not None or is_probe or self._failed >= self._limit:
            self._opens_at = self._clock() + (self._cooldown if told is None else told)
