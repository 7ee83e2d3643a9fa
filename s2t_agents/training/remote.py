"""An LLM behind a vLLM server as teacher: one ``prompt_logprobs`` request reads a whole trajectory.

The server lists its best ``TOP`` tokens at every position (vLLM's default ``max_logprobs``). Candidates that are not
among them count as no likelier than the last listed; KL is summed over the listed tokens, and so a lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import torch
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_exponential
from torch import Tensor

from ..backends.loading import load_tokenizer
from ..backends.statistics import FLOOR
from ..backends.torch.fingerprint import shared_ids, tokenizer_fingerprint
from ..endpoints.endpoint import checked_url
from ..errors import EscalationFailed, TokenizerMismatch
from ..scheduling.language_model import LanguageModel
from .labels import Opinion, Trajectory
from .shards import ModelIdentity

TOP = 20
PARALLEL = 8
"""Requests at a time; the server batches them."""


class RemoteTeacher:
    """A model served by vLLM (see ``labels.Teacher``).

    Args:
        server: base URL, such as ``http://localhost:8000/v1``.
        model: the name that the server knows.
        slm: whose token ids are sent.
        tokenizer: path or hub id of the served model's tokenizer; by default ``model``.
        client: for tests.

    Raises:
        TokenizerMismatch: its ids mean other tokens.
    """

    def __init__(
        self,
        server: str,
        model: str,
        slm: LanguageModel,
        *,
        tokenizer: str | None = None,
        client: httpx.Client | None = None,
    ) -> None:
        theirs = load_tokenizer(tokenizer or model)
        differing = shared_ids(slm.tokenizer, theirs)
        if differing:
            raise TokenizerMismatch(
                f"{model!r} and {slm.name!r} disagree on {len(differing)} token ids, {differing[0]!r} first.",
                hint="Take an LLM of the same family.",
            )
        url = checked_url(server, allow_http=True)
        self._url, self._host, self._model = url.join("completions"), url.host, model
        self._client = client or httpx.Client(timeout=600)
        self.identity = ModelIdentity(
            name=model, tokenizer_fingerprint=tokenizer_fingerprint(theirs), weights_fingerprint="served"
        )

    def opinions(
        self, trajectories: Sequence[Trajectory], slm: Sequence[Tensor], candidates: Sequence[Tensor]
    ) -> list[Opinion]:
        """See ``Teacher``.

        Raises:
            EscalationFailed: no usable answer after three attempts.
        """
        with ThreadPoolExecutor(PARALLEL) as pool:
            listed = list(pool.map(self._read, trajectories))
        return [_opinion(rows, ours, ids) for rows, ours, ids in zip(listed, slm, candidates, strict=True)]

    @retry(
        retry=retry_if_exception_type(EscalationFailed),
        stop=stop_after_attempt(3),
        wait=wait_exponential(max=10),
        reraise=True,
    )
    def _read(self, trajectory: Trajectory) -> list[dict[int, float]]:
        """Listed log-probabilities of the token at every completion step, by token id."""
        prompt, ids = trajectory
        body = {"model": self._model, "prompt": prompt + ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": TOP}
        try:
            answer = self._client.post(self._url, json=body)
            answer.raise_for_status()
            rows: list[dict[str, dict[str, Any]]] = answer.json()["choices"][0]["prompt_logprobs"]
            found = [{int(i): float(entry["logprob"]) for i, entry in row.items()} for row in rows[len(prompt) :]]
        except httpx.HTTPStatusError as error:
            raise self._useless(f"status {error.response.status_code}") from None
        except (httpx.HTTPError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise self._useless(type(error).__name__) from None
        if len(found) != len(ids) or not all(found):
            raise EscalationFailed(f"{self._host} listed {len(found)} positions, not {len(ids)}.")
        return found

    def _useless(self, why: str) -> EscalationFailed:
        return EscalationFailed(
            f"{self._host} gave no usable prompt_logprobs ({why}).", hint="Is it a vLLM server with this model?"
        )


def _opinion(rows: Sequence[dict[int, float]], slm: Tensor, candidates: Tensor) -> Opinion:
    """From listed log-probabilities to what is kept of the LLM; ``slm`` ``[n, V]``, ``candidates`` ``[n, K]``.

    Where some tokens are illegal (``FLOOR``), the legal ones that are listed stand for all that are legal.
    """
    picked, best, divergence = [], [], []
    for at, (row, ids) in enumerate(zip(rows, candidates.tolist(), strict=True)):
        floor = sorted(row.values(), reverse=True)[:TOP][-1]  # the prompt's own token is listed too, however unlikely
        legal = {token: p for token, p in row.items() if slm[at, token] > FLOOR}
        outside = 0.0 if len(legal) == len(row) else math.log(sum(map(math.exp, legal.values())) or 1.0)
        row = {token: p - outside for token, p in legal.items()}
        picked.append([row.get(token, floor - outside) if slm[at, token] > FLOOR else FLOOR for token in ids])
        best.append(max(row, key=lambda token: row[token], default=ids[0]))
        divergence.append(sum(math.exp(p) * (p - float(slm[at, token])) for token, p in row.items()))
    device = slm.device
    kl = torch.tensor(divergence, device=device).clamp_min(0)
    return Opinion(torch.tensor(picked, device=device), torch.tensor(best, device=device), kl)
