"""HTTP statuses: which may be retried, after how long, and which errors the others are."""

from __future__ import annotations

import email.utils
import time
from datetime import UTC

from ..errors import EndpointBusy, EndpointRefused, QuestionRefused

_BUSY_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504, 529})
_QUESTION_STATUSES = frozenset({400, 413, 422})
"""Statuses caused by the request itself, such as a prompt that is too long."""


def status_error(status: int, message: str, wait_s: float | None = None) -> EndpointBusy | EndpointRefused:
    """The error of a status other than 200.

    Args:
        status: as the server answered.
        message: of the error.
        wait_s: seconds until a retry, by its Retry-After; None if it gave none.
    """
    if status in _BUSY_STATUSES:
        return EndpointBusy(message, wait_s=wait_s, status=status)
    kind = QuestionRefused if status in _QUESTION_STATUSES else EndpointRefused
    return kind(message, status=status)


def retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header (a number or an HTTP date), at most an hour; None if missing or invalid."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return min(float(value), 3600.0)
    try:
        at = email.utils.parsedate_to_datetime(value)
        at_s = (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()  # HTTP's dates are GMT, also those without it
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(0.0, at_s - time.time()), 3600.0)
