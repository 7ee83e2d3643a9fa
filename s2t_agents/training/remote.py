"""An LLM on a server as teacher: whole trajectories are read there, many at a time (see ``served_reading``).

The server lists its best tokens at every position. Candidates that are not among them count as no likelier than the
last listed; KL is summed over the listed tokens, and so a lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.fingerprint import tokenizer_fingerprint
from ..backends.loading import load_tokenizer
from ..backends.statistics import FLOOR
from ..endpoints.completions import TOP_LOGPROBS
from ..endpoints.endpoint import Access, Endpoint
from ..endpoints.spending import Spending
from ..llms.question import Conversation
from ..scheduling.language_model import LanguageModel
from .labels import Opinion, Trajectory, check_same_ids, listed_along
from .served_reading import Listed, ServedReader
from .shards import ModelIdentity


class RemoteTeacher:
    """A model on a server (see ``labels.Teacher``).

    Args:
        server: base URL, such as ``http://localhost:8000/v1``.
        model: its name at the server.
        slm: whose token ids are sent.
        tokenizer: path or hub id of the served model's tokenizer; by default ``model``.
        api_key_env: name of the environment variable with the bearer token.
        spending: pays for every request; None counts nothing.

    Raises:
        ConfigError: an invalid URL.
        TokenizerMismatch: its ids mean other tokens.
    """

    def __init__(
        self,
        server: str,
        model: str,
        slm: LanguageModel,
        *,
        tokenizer: str | None = None,
        api_key_env: str | None = None,
        spending: Spending | None = None,
    ) -> None:
        theirs = load_tokenizer(tokenizer or model)
        check_same_ids(slm, theirs, model)
        endpoint = Endpoint(server, Access(api_key_env=api_key_env, allow_http=True))
        words = max(theirs.get_vocab().values()) + 1
        self._reader = ServedReader(endpoint, model, words, spending=spending)
        self.identity = ModelIdentity(
            name=model, tokenizer_fingerprint=tokenizer_fingerprint(theirs), weights_fingerprint="served"
        )

    def opinions(
        self,
        trajectories: Sequence[Trajectory],
        slm: Sequence[Tensor],
        candidates: Sequence[Tensor],
        conversations: Sequence[Conversation] | None = None,
    ) -> list[Opinion]:
        """See ``Teacher``.

        Raises:
            EscalationFailed: no usable answer after several attempts.
            BudgetExceeded: ``spending`` has no room for the next request.
        """
        listed = listed_along(self._reader, trajectories, candidates)
        return [_opinion(rows, ours, ids) for rows, ours, ids in zip(listed, slm, candidates, strict=True)]


def _opinion(rows: Sequence[Listed], slm: Tensor, candidates: Tensor) -> Opinion:
    """From listed log-probabilities to what is kept of the LLM; ``slm`` ``[n, V]``, ``candidates`` ``[n, K]``.

    Where some tokens are illegal (``FLOOR``), the legal ones that are listed stand for all that are legal.
    """
    picked, best, divergence = [], [], []
    for at, (row, ids) in enumerate(zip(rows, candidates.tolist(), strict=True)):
        # the text's own token is listed too, however unlikely
        floor = sorted(row.values(), reverse=True)[:TOP_LOGPROBS][-1]
        legal = {token: p for token, p in row.items() if token < slm.shape[1] and slm[at, token] > FLOOR}
        outside = 0.0 if len(legal) == len(row) else math.log(sum(map(math.exp, legal.values())) or 1.0)
        row = {token: p - outside for token, p in legal.items()}
        picked.append([row.get(token, floor - outside) if slm[at, token] > FLOOR else FLOOR for token in ids])
        best.append(max(row, key=lambda token: row[token], default=ids[0]))
        divergence.append(sum(math.exp(p) * (p - float(slm[at, token])) for token, p in row.items()))
    device = slm.device
    kl = torch.tensor(divergence, device=device).clamp_min(0)
    return Opinion(torch.tensor(picked, device=device), torch.tensor(best, device=device), kl)
