"""Interrupted answers, resumed by the next try so that no escalation is paid for twice.

A budget with ``on_exhausted="raise"`` or ``"ask"`` refuses in the middle of an answer. The tokens generated so far are
kept; the next call with the same conversation starts from them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, Self

from langchain_core.messages import BaseMessage, SystemMessage
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..ledger import Cost
from ..scheduling.admission import AdmissionTicket
from ..types import EscalationReport, Step
from .accounting import Account

MAX_ANSWERS = 4
"""Answers kept at once. An agent has one; more come from tries with another model or other tools."""
MAX_ANSWER_TOKENS = 1 << 16
"""Longest answer that is kept, in tokens."""
REPLAYED_ESCALATION = EscalationReport(
    "picked", None, None, 0.0, "paid for before this answer was interrupted", replayed=True
)

_log = logging.getLogger(__name__)


class PartialAnswer(BaseModel):
    """The tokens of an answer so far; stored in checkpoints as JSON.

    Attributes:
        tokens: token ids.
        paid: indices of the tokens that the LLM picked.
        broken: the answer ended with an error and can be resumed; False if it was finished.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: tuple[int, ...] = Field(default=(), max_length=MAX_ANSWER_TOKENS)
    paid: tuple[int, ...] = Field(default=(), max_length=MAX_ANSWER_TOKENS)
    broken: bool = True

    def fits(self, vocab_size: int) -> bool:
        """Whether all token ids are in a vocabulary of this size."""
        return all(0 <= token < vocab_size for token in self.tokens)


EMPTY_ANSWER = PartialAnswer()


class Unfinished:
    """Interrupted answers by conversation. Pass the same object to the next try, as ``s2t_unfinished``.

    ::

        unfinished = Unfinished()
        try:
            llm.invoke(question, s2t_budget=budget, s2t_unfinished=unfinished)
        except BudgetExceeded:
            budget.extend(escalations=3)
            llm.invoke(question, s2t_budget=budget, s2t_unfinished=unfinished)  # pays only for the rest

    A try resumes an earlier one if model, tools and messages are the same. System messages may differ, since they
    often hold the time or the budget left. Finished answers are not resumed.
    """

    def __init__(self) -> None:
        self._partial_answers: dict[str, PartialAnswer] = {}
        self._costs: list[Cost] = []

    def __repr__(self) -> str:
        return f"<Unfinished: {len(self.as_dict())} answers>"

    def as_dict(self) -> dict[str, Any]:
        """The interrupted answers as JSON values, by conversation key."""
        return {
            key: partial.model_dump(mode="json") for key, partial in self._partial_answers.items() if partial.broken
        }

    def resume(self, stored: object) -> Self:
        """Load the answers of a checkpoint and drop finished ones.

        If this process has a longer version of an answer, that one is kept. Anything that is not an ``as_dict()`` is
        ignored.
        """
        known, self._partial_answers = (
            self._partial_answers,
            {key: partial for key, partial in self._partial_answers.items() if partial.broken},
        )
        for key, data in list(stored.items())[-MAX_ANSWERS:] if isinstance(stored, Mapping) else ():
            try:
                partial = PartialAnswer.model_validate(data)
            except ValidationError:
                _log.debug("an unfinished answer in a checkpoint cannot be read: it is written anew")
                continue
            known_answer = known.get(key, EMPTY_ANSWER)
            extends = known_answer.tokens[: len(partial.tokens)] == partial.tokens
            self._keep(str(key), known_answer.model_copy(update={"broken": True}) if extends else partial)
        return self

    def begin(self, key: str, vocab_size: int) -> PartialAnswer:
        """The interrupted answer of a conversation; empty if there is none."""
        partial = self._partial_answers.get(key, EMPTY_ANSWER)
        return partial if partial.broken and partial.fits(vocab_size) else EMPTY_ANSWER

    def recording(
        self, key: str, partial: PartialAnswer, steps: Generator[AdmissionTicket | Step, None, None], account: Account
    ) -> Generator[AdmissionTicket | Step, None, None]:
        """Pass the steps on, mark those paid for in an earlier try as free, and keep the tokens if an error comes.

        Args:
            key: of the conversation.
            partial: the interrupted answer that the engine was given.
            steps: the engine's.
            account: of this try; if it fails, its cost is kept for ``take_costs``.
        """
        tokens: list[int] = []
        paid: list[int] = []
        resumable = True  # no refusal so far: another try would generate the same tokens
        broken = False
        paid_before = frozenset(partial.paid)
        try:
            with closing(steps):
                for each in steps:
                    if isinstance(each, Step):
                        if each.index in paid_before and each.picked_by == "slm" and each.entropy is None:
                            each = replace(each, picked_by="llm", escalation=REPLAYED_ESCALATION)
                        resumable = resumable and (each.escalation is None or each.escalation.outcome != "refused")
                        if resumable:
                            tokens.append(each.token_id)
                            paid += [each.index] if each.picked_by == "llm" else []
                    yield each
        except Exception:
            broken = True
            self._costs.append(account.cost)
            raise
        finally:
            if len(tokens) <= MAX_ANSWER_TOKENS:
                self._keep(key, PartialAnswer(tokens=tuple(tokens), paid=tuple(paid), broken=broken))

    def take_costs(self) -> list[Cost]:
        """The cost of each try that was interrupted since the last call."""
        costs, self._costs = self._costs, []
        return costs

    def _keep(self, key: str, partial: PartialAnswer) -> None:
        others = {other: kept for other, kept in self._partial_answers.items() if other != key}
        self._partial_answers = {**dict(list(others.items())[1 - MAX_ANSWERS :]), key: partial}


def conversation_key(model: str, request: str, messages: Sequence[BaseMessage]) -> str:
    """A hash that is equal for two tries at one answer.

    Args:
        model: name of the model.
        request: ``ResponseOptions.cache_key``.
        messages: the conversation; system messages are ignored.
    """
    turns: Iterable[Any] = (
        [m.type, m.content, m.name, getattr(m, "tool_calls", None), getattr(m, "tool_call_id", None)]
        for m in messages
        if not isinstance(m, SystemMessage)
    )
    text = json.dumps([model, request, *turns], sort_keys=True, default=str)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
