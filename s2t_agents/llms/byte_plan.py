"""What a question is to an LLM with another tokenizer: its prompt, the text so far, and the candidates' bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError, EscalationFailed, InputError
from .covering import Covering, EndScores, Scores
from .question import Answer, Question
from .token_map import Counterpart, TokenMap


@dataclass(frozen=True)
class Plan:
    """What one question wants of the LLM.

    Attributes:
        ids: the LLM's tokens up to those that may still change.
        covering: what comes after them.
        wanted: ``[K]``: what each candidate is to the LLM.
        scored: for each candidate its place among those of the covering; None of others.
        tokens: between the SLM's tokens and the LLM's.
    """

    ids: list[int]
    covering: Covering
    wanted: Sequence[Counterpart]
    scored: Sequence[int | None]
    tokens: TokenMap

    def answer(self, scores: Scores | EndScores, how: str) -> Answer:
        """The scores of all candidates, and a remark that says ``how`` they came about."""
        found = scores.log_probs_of_tokens(self.tokens.slm.view)
        answers = [
            found[at] if at is not None else scores.log_prob_of_control(each) if isinstance(each, frozenset) else None
            for each, at in zip(self.wanted, self.scored, strict=True)
        ]
        left_out = sum(each is None for each in self.wanted)
        counterparts = f"; {left_out} of {len(self.wanted)} candidates have no counterpart there" if left_out else ""
        return Answer(tuple(answers), note=f"{how} by bytes, another tokenizer{counterparts}")


class Planner:
    """Plans of one generation's questions.

    Args:
        name: of the LLM, for errors.
        tokens: between the SLM's tokens and the LLM's.
    """

    def __init__(self, name: str, tokens: TokenMap) -> None:
        self._name, self._tokens = name, tokens
        self._plan: tuple[Question, Plan] | None = None
        self._prompt: tuple[object, list[int]] | None = None

    def plan(self, question: Question) -> Plan:
        """The plan of a question; made once.

        Raises:
            EscalationFailed: the text so far cannot be written, or nothing can be compared.
        """
        if self._plan is None or self._plan[0] is not question:
            self._plan = question, self._make(question)
        return self._plan[1]

    def _make(self, question: Question) -> Plan:
        tokens = self._tokens
        wanted = [tokens.of(token) or None for token in question.candidates]
        if sum(each is not None for each in wanted) < 2:
            raise EscalationFailed(f"{self._name!r} has nothing for all but one of the candidates.")
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
            raise EscalationFailed(f"{self._name!r} cannot be asked: {error}") from error
        ids = [*ids, *covering.trunk]
        if not ids:
            raise EscalationFailed(f"{self._name!r} has no token to begin a text with.")
        scored = [next(places) if isinstance(each, bytes) else None for each in wanted]
        return Plan(ids, covering, wanted, scored, tokens)

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
