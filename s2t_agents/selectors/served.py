"""A selector that runs on the SLM's server (``integrations/vllm.py``): what it did is read, not done again."""

from __future__ import annotations

import torch
from torch import Tensor

from ..endpoints.served_selection import ServerSelection
from ..proposal import Proposal
from ..triggers import Trigger, when

SERVER = "server"
"""``ChatS2T(model="vllm://...", selector="server")``."""


def selection_at(proposal: Proposal) -> ServerSelection | None:
    """What the server's selector did at this step; None where it was not triggered, or is none."""
    found: ServerSelection | None = getattr(proposal.prefix.cache, "selection", None)
    return found


def served() -> Trigger:
    """The steps at which the server's selector was triggered."""
    return when(_was_selected, "served()")


def _was_selected(proposal: Proposal) -> bool:
    return selection_at(proposal) is not None


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
