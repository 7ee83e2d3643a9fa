"""What a chat model of any provider raises, as the error of its kind: read with care, and shown by its class alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import httpx

from ..endpoints.statuses import retry_after, status_error
from ..errors import ConfigError, EndpointDown, EndpointRefused, EscalationFailed, InputError, QuestionRefused
from .question import Question


@dataclass(frozen=True)
class ProviderError:
    """An error of the chat model.

    Attributes:
        error: as it was raised.
        status: of HTTP; None if it tells none.
        wait_s: seconds of the response's Retry-After header; None if the client exposes none.
    """

    error: BaseException
    status: int | None
    wait_s: float | None

    @classmethod
    def of(cls, error: BaseException) -> ProviderError:
        """Read it, in the call's own thread: what foreign code raises on the way is no interruption of the caller's."""
        status = attribute_of(error, "status_code")
        headers = attribute_of(attribute_of(error, "response"), "headers")
        value = headers.get("retry-after") if isinstance(headers, Mapping) else None
        wait_s = retry_after(value) if isinstance(value, str) else None
        return cls(error, status if is_int(status) else None, wait_s)

    def fault(self, question: Question) -> EscalationFailed:
        """The error to raise, without a chain; where nothing was spent, the question is told.

        Its message may contain secrets, so only its class is shown.
        """
        error, kind = self.error, type(self.error).__name__
        if isinstance(error, EscalationFailed):
            return error
        if self.status is not None and self.status >= 400:
            question.owe(None)
            return status_error(self.status, f"the judge's provider answered {self.status} ({kind}).", self.wait_s)
        if isinstance(error, (ConfigError, InputError)):  # of a ChatS2T, before it has run
            question.owe(None)
            refusal = QuestionRefused if isinstance(error, InputError) else EndpointRefused
            return refusal(f"the judge cannot take the question: {error}")
        if _is_connection_failure(error):
            question.owe(None)
            return EndpointDown(f"the judge cannot be reached ({kind}).")
        return EscalationFailed(f"the judge failed ({kind}).")


def attribute_of(foreign: object, name: str) -> Any:
    """An attribute of a foreign object; None if missing, or if reading it raises."""
    try:
        return getattr(foreign, name, None)
    except BaseException:  # noqa: BLE001 - a property may raise anything
        return None


def is_int(value: object) -> TypeGuard[int]:
    """Whether it is a whole number, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_connection_failure(error: BaseException | None) -> bool:
    """Whether the error, or one in its chain, is a failure to connect."""
    for _ in range(8):
        if error is None:
            return False
        if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, ConnectionRefusedError)):
            return True
        error = error.__cause__ or error.__context__
    return False
