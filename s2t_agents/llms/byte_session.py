"""One generation's questions to an LLM on this machine with another tokenizer: candidates are scored by their bytes.

SLM    its prompt | its answer so far              candidates: tokens
LLM    its own prompt | the same answer's bytes    candidates: their bytes; control tokens by their role
"""

from __future__ import annotations

from ..budget.charges import charge_for
from ..scheduling.waits import Waiting
from ..types import Charge, Price
from .base import WaitingSession
from .byte_plan import Planner
from .kept_prefix import KeptPrefix, check_fits
from .question import Answer, Question
from .token_map import TokenMap


class ByteSession(WaitingSession):
    """The questions of one generation.

    Args:
        name: of the LLM.
        price: of its tokens; None if unknown.
        kept: the generation's KV cache in the LLM.
        tokens: between the SLM's tokens and the LLM's.
    """

    def __init__(self, name: str, price: Price | None, kept: KeptPrefix, tokens: TokenMap) -> None:
        self._price, self._kept, self._planner = price, kept, Planner(name, tokens)

    def quote(self, question: Question) -> Charge:
        """The cost of all tokens that are to be read: new ones, and the tree of the candidates; and of one written."""
        plan = self._planner.plan(question)
        sequence, new = self._kept.take(plan.ids, question.scope), 0
        if sequence.ids != plan.ids:
            new = len(plan.ids) - min(sequence.common_prefix(plan.ids), len(plan.ids) - 1)
        return charge_for(self._price, input_tokens=new + len(plan.covering.tree.ids))

    def asking(self, question: Question) -> Waiting[Answer]:
        """Score every candidate that the LLM has something for, in one forward.

        Raises:
            EscalationFailed: the text so far cannot be written or is too long, nothing can be compared, or the device
                failed (out of memory).
        """
        cost, plan = self.quote(question), self._planner.plan(question)
        sequence, tree = self._kept.take(plan.ids, question.scope), plan.covering.tree
        check_fits(sequence.model, len(plan.ids), len(tree.ids))
        with self._kept.asked():
            logits = yield from sequence.moving_to_tree(plan.ids, tree.ids, tree.parents)
        question.owe(cost)
        return plan.answer(plan.covering.read(logits), "exact")

    def close(self) -> None:
        """Keep the KV cache for the next turn."""
        self._kept.close()
