"""A selector that runs on the SLM's server (``integrations/vllm.py``): what it did is read, not done again."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..endpoints.served_selection import ServerSelection
from ..proposal import Proposal
from ..triggers import Trigger

_log = logging.getLogger(__name__)

UNSURE_NATS, UNSURE_STEPS = 1.0, 100
"""A step that most triggers would take, and after how many of them without any triggered there is a warning."""

SERVER = "server"
"""``ChatS2T(model="vllm://...", selector="server")``."""


def selection_at(proposal: Proposal) -> ServerSelection | None:
    """What the server's selector did at this step; None where it was not triggered, or is none."""
    found: ServerSelection | None = getattr(proposal.prefix.cache, "selection", None)
    return found


class Served(Trigger):
    """The steps at which the server's selector was triggered.

    Nothing but a triggered step shows that there is one. Where many unsure steps show none, one warning is logged.
    """

    def __init__(self) -> None:
        self._unsure, self._settled = 0, False

    def __call__(self, proposal: Proposal) -> bool:
        """Whether the server's selector was triggered."""
        triggered = selection_at(proposal) is not None
        if triggered:
            self._settled = True
        elif not self._settled and proposal.entropy >= UNSURE_NATS:
            self._unsure += 1
            if self._unsure == UNSURE_STEPS:
                self._settled = True
                _log.warning(
                    "%d steps had an entropy of %g nats or more, and the server's selector was triggered at none: it"
                    " may run without the plugin. S2T_SELECTOR is set where it is started; its log tells the rest.",
                    UNSURE_STEPS, UNSURE_NATS,
                )  # fmt: skip
        return triggered

    def __repr__(self) -> str:
        return "served()"


class ServedSelector:
    """The server's scores."""

    def scores(self, proposal: Proposal) -> Tensor:
        """``[K]``: log-probabilities by the server's selector; the SLM's own where that was not triggered."""
        selection = selection_at(proposal)
        if selection is None:
            return proposal.candidate_log_probs
        known = dict(selection.candidates)
        return torch.tensor([known[token] for token in proposal.candidates.tolist()])

    def __repr__(self) -> str:
        return "ServedSelector()"
