"""How long to wait before a server that declined is asked again."""

from __future__ import annotations

from tenacity import RetryCallState, wait_random_exponential

from ..errors import EndpointBusy

JITTER = wait_random_exponential(multiplier=0.1, max=2.0)
"""Random seconds between attempts, in addition to Retry-After: up to 0.1, 0.2, 0.4, ..."""


def retry_wait(state: RetryCallState) -> float:
    """Seconds until the next attempt: Retry-After plus jitter."""
    error = state.outcome.exception() if state.outcome else None
    retry_after_s = error.wait_s if isinstance(error, EndpointBusy) else None
    return JITTER(state) + (retry_after_s or 0.0)
