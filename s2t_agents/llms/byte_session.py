"""One generation's questions to an LLM on this machine with another tokenizer: candidates are scored by their bytes.

SLM    its prompt | its answer so far              candidates: tokens
LLM    its own prompt | the same answer's bytes    candidates: their bytes; control tokens by their role
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..errors import ConfigError, EscalationFailed, InputError
from ..hub import first_line
from ..scheduling.idle_sequences import IdleSequences
from ..scheduling.language_model import LanguageModel
from ..scheduling.sequence import TokenSequence
from ..scheduling.waits import Waiting
from ..types import Charge, Price
from .base import WaitingSession
from .covering import Covering
from .question import Answer, Question, charge
from .token_map import Counterpart, TokenMap


class AskedModel(Protocol):
    """An LLM on this machine: ``LocalLLM``."""

    name: str
    price: Price | None
    idle: IdleSequences

    def load(self) -> LanguageModel:
        """Its weights; errors as ``LocalLLM.load``."""
        ...


@dataclass(frozen=True)
class Plan:
    """What one question wants of the LLM.

    Attributes:
        ids: the LLM's tokens up to those that may still change.
        covering: what comes after them.
        wanted: ``[K]``: what each candidate is to the LLM.
        scored: for each candidate its place among those of the covering; None of others.
    """

    ids: list[int]
    covering: Covering
    wanted: Sequence[Counterpart]
    scored: Sequence[int | None]


class ByteSession(WaitingSession):
    """The KV cache of one generation in the LLM, extended lazily.

    Args:
        llm: whose session this is.
        tokens: between the SLM's tokens and the LLM's.
    """

    def __init__(self, llm: AskedModel, tokens: TokenMap) -> None:
        self._llm, self._tokens = llm, tokens
        self._prefix: TokenSequence | None = None
        self._plan: tuple[Question, Plan] | None = None
        self._prompt: tuple[object, list[int]] | None = None

    def quote(self, question: Question) -> Charge:
        """The cost of all tokens that are to be read: new ones, and the tree of the candidates; and of one written."""
        plan = self._planned(question)
        scope = question.prefix.scope if question.prefix is not None else None
        if self._prefix is None:
            self._prefix = self._llm.idle.take(plan.ids, scope) or TokenSequence(self._llm.load(), scope)
        new = 0
        if self._prefix.ids != plan.ids:
            new = len(plan.ids) - min(self._prefix.common_prefix(plan.ids), len(plan.ids) - 1)
        return charge(self._llm.price, input_tokens=new + len(plan.covering.tree.ids))

    def asking(self, question: Question) -> Waiting[Answer]:
        """Score every candidate that the LLM has something for, in one forward.

        Raises:
            EscalationFailed: the text so far cannot be written or is too long, nothing can be compared, or the device
                failed (out of memory).
        """
        cost, plan = self.quote(question), self._planned(question)
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
        scores = plan.covering.read(logits)
        found = scores.log_probs_of_tokens(self._tokens.slm.view)
        answers = [
            found[at] if at is not None else scores.log_prob_of_control(each) if isinstance(each, frozenset) else None
            for each, at in zip(plan.wanted, plan.scored, strict=True)
        ]
        return Answer(tuple(answers), note=_note(plan))

    def close(self) -> None:
        """Keep the KV cache for the next turn."""
        if self._prefix is not None:
            self._llm.idle.put(self._prefix)
            self._prefix = None

    def _planned(self, question: Question) -> Plan:
        if self._plan is None or self._plan[0] is not question:
            self._plan = question, self._make(question)
        return self._plan[1]

    def _make(self, question: Question) -> Plan:
        tokens = self._tokens
        wanted = [tokens.of(token) or None for token in question.candidates]
        if sum(each is not None for each in wanted) < 2:
            raise EscalationFailed(f"{self._llm.name!r} has nothing for all but one of the candidates.")
        conversation = question.conversation
        start = conversation.prompt_tokens if conversation is not None else 0
        *before, last = tokens.runs(question.ids[start:])
        texts = [each for each in wanted if isinstance(each, bytes)]
        places = iter(range(len(texts)))
        try:
            ids = self._prompt_of(question)
            for run in before:
                ids = [*ids, *tokens.llm.view.encode(run.text), *([run.control] if run.control is not None else [])]
            covering = Covering(tokens.places, last.text, texts)
        except (InputError, ConfigError) as error:
            raise EscalationFailed(f"{self._llm.name!r} cannot be asked: {error}") from error
        ids = [*ids, *covering.trunk]
        if not ids:
            raise EscalationFailed(f"{self._llm.name!r} has no token to begin a text with.")
        return Plan(ids, covering, wanted, [next(places) if isinstance(each, bytes) else None for each in wanted])

    def _prompt_of(self, question: Question) -> list[int]:
        """The conversation as the LLM reads it; without one, what a text begins with."""
        conversation = question.conversation
        if conversation is None:
            begin = self._tokens.llm.tokenizer.bos_token_id
            return [] if begin is None else [int(begin)]
        if self._prompt is None or self._prompt[0] is not conversation:
            side = self._tokens.llm
            self._prompt = conversation, conversation.prompt_for(side.tokenizer, side.template, side.reasoning)
        return self._prompt[1]


def _note(plan: Plan) -> str:
    """What the receipt says."""
    left_out = sum(each is None for each in plan.wanted)
    if not left_out:
        return "exact by bytes, another tokenizer"
    return f"exact by bytes, another tokenizer; {left_out} of {len(plan.wanted)} candidates have no counterpart there"
