"""A circuit breaker: an endpoint that failed gets no questions during a cooldown, then one as a probe.

closed ──failures in a row, or no connection ───────> open ──cooldown──> half-open ──one question──> closed
                                                        ^                    │ fails
                                                        └────────────────────┘

Where it said for how long (Retry-After), it gets none until then, whatever becomes of questions already under way.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from ..errors import ConfigError, EndpointBusy, EndpointDown, EscalationFailed, OutOfTime, QuestionRefused
from ..fork_safety import hold_while_forking

State = Literal["closed", "open", "half-open"]

CALLER_FAULTS = (OutOfTime, QuestionRefused)
"""Failures caused by the caller, which do not count against the endpoint."""


class CircuitBreaker:
    """The circuit breaker of one endpoint; may be shared by all LLMs behind the same endpoint.

    Args:
        failures: consecutive failures that open it; an endpoint that cannot be reached opens it at once.
        cooldown_s: seconds until one question is let through as a probe.
        clock: monotonic seconds.

    Raises:
        ConfigError: ``failures`` below 1, or a negative cooldown.
    """

    def __init__(
        self, *, failures: int = 3, cooldown_s: float = 30.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if failures < 1 or not cooldown_s >= 0:
            raise ConfigError(f"a breaker needs failures >= 1 and cooldown_s >= 0, not {failures} and {cooldown_s}.")
        self._max_failures, self._cooldown, self._clock = failures, cooldown_s, clock
        self._failures_in_row = 0
        self._opens_at: float | None = None
        self._asked_until = -math.inf
        """The end of the longest wait that the endpoint has asked for."""
        self._probing = False
        self._lock = threading.Lock()
        hold_while_forking(self, "_lock")

    @property
    def state(self) -> State:
        """ "closed": all questions pass; "open": none; "half-open": one, as a probe."""
        with self._lock:
            if self._opens_at is None:
                return "closed"
            return "open" if self._clock() < self._opens_at or self._probing else "half-open"

    def check(self) -> None:
        """Raise now if ``attempt`` would.

        Raises:
            EndpointDown: the breaker is open.
        """
        with self._lock:
            self._refuse_if_open()

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Context of one question: records success or failure.

        An interrupted caller, the caller's own deadline, and a question that the server refuses do not count.

        Raises:
            EndpointDown: the breaker is open.
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
                if isinstance(error, EscalationFailed) and not isinstance(error, CALLER_FAULTS):
                    self._record_failure(error, is_probe=is_probe)
            raise
        with self._lock:
            self._failures_in_row, self._probing = 0, self._probing and not is_probe
            self._opens_at = self._asked_until if self._clock() < self._asked_until else None

    def _refuse_if_open(self) -> None:
        if self._opens_at is None:
            return
        wait = self._opens_at - self._clock()
        if wait > 0:
            raise EndpointDown(f"its endpoint failed before and is left alone for another {wait:.3g} s.", wait_s=wait)
        if self._probing:
            raise EndpointDown("its endpoint failed before and is being tried by another question.")

    def _record_failure(self, error: EscalationFailed, *, is_probe: bool) -> None:
        self._failures_in_row += 1
        now, retry_after_s = self._clock(), error.wait_s if isinstance(error, EndpointBusy) else None
        if retry_after_s is not None:
            self._opens_at = self._asked_until = max(self._asked_until, now + retry_after_s)
        elif isinstance(error, EndpointDown) or is_probe or self._failures_in_row >= self._max_failures:
            self._opens_at = max(self._asked_until, now + self._cooldown)
        if isinstance(error, EndpointDown) and self._opens_at is not None:
            error.wait_s = self._opens_at - now
