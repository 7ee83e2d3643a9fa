"""Log-probabilities of an answer's tokens, as OpenAI's clients read them.

They are the SLM's, over the tokens that were legal: of a token that the selector or the LLM chose, they say how likely
it was before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..types import Step
from .generation import Generation


class LogprobsReader:
    """Reads a generation's log-probabilities while its steps come.

    Args:
        generation: which.
        asked: whether the call asked for them.
        name: how a token is called, end tokens too; where it is not given, by its text, which end tokens do not have.
    """

    def __init__(self, generation: Generation, asked: bool, *, name: Callable[[int], str] | None = None) -> None:
        self._generation, self._asked, self._name, self._read = generation, asked, name or generation.decode, 0
        self._omitted = generation.eos_ids if name is None else frozenset[int]()

    def new(self) -> dict[str, Any]:
        """``{"logprobs": {"content": [...], "refusal": None}}`` of the steps since the last call; {} for none."""
        if not self._asked:
            return {}
        steps = self._generation.account.steps[self._read :]
        self._read += len(steps)
        content = [self._entry(step) for step in steps if step.token_id not in self._omitted]
        return {"logprobs": {"content": content, "refusal": None}} if content else {}

    def _entry(self, step: Step) -> dict[str, Any]:
        known = step.logprobs
        if not known and step.picked_by == "grammar":  # the only legal token
            known = ((step.token_id, 0.0),)
        score = known[0][1] if known else None
        likeliest = [self._token(token_id, each) for token_id, each in known[1:]]
        return {**self._token(step.token_id, score), "top_logprobs": likeliest}

    def _token(self, token_id: int, score: float | None) -> dict[str, Any]:
        text = self._name(token_id)
        in_part = "\N{REPLACEMENT CHARACTER}" in text  # a part of a character, which clients put together by its bytes
        data = self._generation.token_bytes(token_id) if in_part else text.encode()
        return {"token": text, "bytes": list(data), "logprob": score}
