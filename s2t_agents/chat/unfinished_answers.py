"""Answers that broke off after some of their picks were paid for: the next try goes on where they stopped.

A budget that raises or asks refuses in the middle of an answer. What stands by then is kept as token ids; the same
conversation put again begins with them, so that no question to the LLM is put, or paid for, a second time.
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
from ..scheduling.admission import Place
from ..types import EscalationReport, Step
from .accounting import Account

KEPT = 4
"""Answers kept at once; an agent has one, more come from tries with another model or other tools."""
LONGEST = 1 << 16
"""Tokens of an answer that are kept at most."""
REPLAYED = EscalationReport("picked", None, None, 0.0, "paid for before this answer was interrupted", replayed=True)

_log = logging.getLogger(__name__)


class Begun(BaseModel):
    """The beginning of an answer.

    Attributes:
        tokens: as far as it came.
        paid: positions of those that the LLM picked.
        broken: it ended with an error, and the next try goes on from here; else it was finished.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: tuple[int, ...] = Field(default=(), max_length=LONGEST)
    paid: tuple[int, ...] = Field(default=(), max_length=LONGEST)
    broken: bool = True

    def fits(self, vocab_size: int) -> bool:
        """Whether a model with so many tokens can go on from here."""
        return all(0 <= token < vocab_size for token in self.tokens)


NOTHING = Begun()


class Unfinished:
    """Answers that broke off, by conversation. Give the same object to the next try, as ``s2t_unfinished``.

    ::

        unfinished = Unfinished()
        try:
            llm.invoke(question, s2t_budget=budget, s2t_unfinished=unfinished)
        except BudgetExceeded:
            budget.extend(escalations=3)
            llm.invoke(question, s2t_budget=budget, s2t_unfinished=unfinished)  # pays for the rest alone

    A try belongs to an earlier one if model, tools and messages are the same; system messages may differ, since they
    often tell the time or what is left. An answer that was finished is not kept for the next.
    """

    def __init__(self) -> None:
        self._begun: dict[str, Begun] = {}
        self._costs: list[Cost] = []

    def __repr__(self) -> str:
        return f"<Unfinished: {len(self.as_dict())} answers>"

    def as_dict(self) -> dict[str, Any]:
        """What broke off, for JSON."""
        return {key: begun.model_dump(mode="json") for key, begun in self._begun.items() if begun.broken}

    def resume(self, stored: object) -> Self:
        """Take up what a checkpoint holds, and forget all else that was finished.

        What this process knows goes further than an old checkpoint; what is no ``as_dict()`` counts as nothing.
        """
        known, self._begun = self._begun, {key: begun for key, begun in self._begun.items() if begun.broken}
        for key, data in list(stored.items())[-KEPT:] if isinstance(stored, Mapping) else ():
            try:
                begun = Begun.model_validate(data)
            except ValidationError:
                _log.debug("an unfinished answer in a checkpoint cannot be read: it is written anew")
                continue
            mine = known.get(key, NOTHING)
            further = mine.tokens[: len(begun.tokens)] == begun.tokens
            self._keep(str(key), mine.model_copy(update={"broken": True}) if further else begun)
        return self

    def begin(self, key: str, vocab_size: int) -> Begun:
        """How the answer to a conversation begins; empty where none broke off."""
        begun = self._begun.get(key, NOTHING)
        return begun if begun.broken and begun.fits(vocab_size) else NOTHING

    def watching(
        self, key: str, begun: Begun, steps: Generator[Place | Step, None, None], account: Account
    ) -> Generator[Place | Step, None, None]:
        """The same steps, with those that were paid for before marked as free; they are kept, should an error come.

        Args:
            key: of the conversation.
            begun: what the engine was given to begin with.
            steps: the engine's.
            account: of this try; what it cost is kept too.
        """
        tokens: list[int] = []
        paid: list[int] = []
        wanted = True  # up to here nothing was refused: another try would write the same
        broken = False
        again = frozenset(begun.paid)
        try:
            with closing(steps):
                for each in steps:
                    if isinstance(each, Step):
                        if each.index in again and each.picked_by == "slm" and each.entropy is None:
                            each = replace(each, picked_by="llm", escalation=REPLAYED)
                        wanted = wanted and (each.escalation is None or each.escalation.outcome != "refused")
                        if wanted:
                            tokens.append(each.token_id)
                            paid += [each.index] if each.picked_by == "llm" else []
                    yield each
        except Exception:
            broken = True
            self._costs.append(account.summary.cost)
            raise
        finally:
            if len(tokens) <= LONGEST:
                self._keep(key, Begun(tokens=tuple(tokens), paid=tuple(paid), broken=broken))

    def take_costs(self) -> list[Cost]:
        """What each try cost that broke off since this was last asked."""
        costs, self._costs = self._costs, []
        return costs

    def _keep(self, key: str, begun: Begun) -> None:
        others = {other: kept for other, kept in self._begun.items() if other != key}
        self._begun = {**dict(list(others.items())[1 - KEPT :]), key: begun}


def conversation_key(model: str, request: str, messages: Sequence[BaseMessage]) -> str:
    """Equal for two tries at one answer.

    Args:
        model: whose token ids they are.
        request: what is legal, such as ``Request.key``.
        messages: the conversation; system messages do not count.
    """
    said: Iterable[Any] = (
        [m.type, m.content, m.name, getattr(m, "tool_calls", None), getattr(m, "tool_call_id", None)]
        for m in messages
        if not isinstance(m, SystemMessage)
    )
    text = json.dumps([model, request, *said], sort_keys=True, default=str)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
