"""What a server did wrong, told as a fault of the model's own server: an LLM's is worked around, this one is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...errors import (
    EndpointBusy,
    EndpointDown,
    EndpointRefused,
    EscalationFailed,
    ModelServerBusy,
    ModelServerDown,
    ModelServerError,
    ModelServerRefused,
)


@contextmanager
def model_server_errors(name: str) -> Iterator[None]:
    """Raise the block's ``EscalationFailed`` as the ``ModelServerError`` of its kind.

    Args:
        name: of the model, with its address.

    Raises:
        ModelServerDown, ModelServerBusy, ModelServerRefused, ModelServerError: instead.
    """
    try:
        yield
    except EscalationFailed as error:
        raise _told(name, error) from error


def _told(name: str, error: EscalationFailed) -> ModelServerError:
    message = f"{name}: {error}"
    match error:
        case EndpointDown(wait_s=wait_s):
            return ModelServerDown(message, wait_s=wait_s, hint="Is the server running, at this address?")
        case EndpointBusy(wait_s=wait_s):
            return ModelServerBusy(message, wait_s=wait_s, hint="Ask again later, or raise attempts.")
        case EndpointRefused():
            return ModelServerRefused(message, hint="Compare name, key and limits with the server's.")
    return ModelServerError(message, hint="Its own log may say more.")
