"""One generation's questions to an LLM on this machine with another tokenizer: candidates are scored by their bytes.

SLM    its prompt | its answer so far              candidates: tokens
LLM    its own prompt | the same answer's bytes    candidates: their bytes; control tokens by their role
"""

from __future__ import annotations

from typing import Protocol

from ..budget.charges import charge_for
from ..errors import EscalationFailed
from ..hub import first_line
from ..scheduling.idle_sequences import IdleSequences
from ..scheduling.language_model import LanguageModel
from ..scheduling.sequence import TokenSequence
from ..scheduling.waits import Waiting
from ..types import Charge, Price
from .base import WaitingSession
from .byte_plan import Planner
from .question import Answer, Question
from .token_map import TokenMap


class AskedModel(Protocol):
    """An LLM on this machine: ``LocalLLM``."""

    name: str
    price: Price | None
    idle: IdleSequences

    def load(self) -> LanguageModel:
        """Its weights; errors as ``LocalLLM.load``."""
        ...


class ByteSession(WaitingSession):
    """The KV cache of one generation in the LLM, extended lazily.

    Args:
        llm: whose session this is.
        tokens: between the SLM's tokens and the LLM's.
    """

    def __init__(self, llm: AskedModel, tokens: TokenMap) -> None:
        self._llm, self._planner = llm, Planner(llm.name, tokens)
        self._prefix: TokenSequence | None = None

    def quote(self, question: Question) -> Charge:
        """The cost of all tokens that are to be read: new ones, and the tree of the candidates; and of one written."""
        plan = self._planner.plan(question)
        scope = question.prefix.scope if question.prefix is not None else None
        if self._prefix is None:
            self._prefix = self._llm.idle.take(plan.ids, scope) or TokenSequence(self._llm.load(), scope)
        new = 0
        if self._prefix.ids != plan.ids:
            new = len(plan.ids) - min(self._prefix.common_prefix(plan.ids), len(plan.ids) - 1)
        return charge_for(self._llm.price, input_tokens=new + len(plan.covering.tree.ids))

    def asking(self, question: Question) -> Waiting[Answer]:
        """Score every candidate that the LLM has something for, in one forward.

        Raises:
            EscalationFailed: the text so far cannot be written or is too long, nothing can be compared, or the device
                failed (out of memory).
        """
        cost, plan = self.quote(question), self._planner.plan(question)
        assert self._prefix is not None
        tree = plan.covering.tree
        window = self._prefix.model.context_window
        if len(plan.ids) + len(tree.ids) >= window:
            raise EscalationFailed(f"a prefix of {len(plan.ids)} tokens does not fit the LLM's context of {window}.")
        try:
            logits = yield from self._prefix.moving_to_tree(plan.ids, tree.ids, tree.parents)
        except RuntimeError as error:
            self._prefix = None  # its KV cache may be inconsistent
            raise EscalationFailed(f"the LLM broke down on this machine: {first_line(error)}.") from error
        question.owe(cost)
        return plan.answer(plan.covering.read(logits), "exact")

    def close(self) -> None:
        """Keep the KV cache for the next turn."""
        if self._prefix is not None:
            self._llm.idle.put(self._prefix)
            self._prefix = None
