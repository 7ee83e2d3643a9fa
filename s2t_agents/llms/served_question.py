"""A question as one request to a completions server: prompts as token ids, and whose log-probabilities are wanted.

With the SLM's tokenizer that is one prompt and the candidates. With another one every context of the covering is a
prompt, all in one request, and the same ids are wanted after each: all that count, where the server takes so many, and
then the scores are exact. Else there is one prompt, that of the text so far, and of each candidate the tokens that
begin with it, or its first where it takes several: the scores are approximate, and the receipt says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from ..errors import EscalationFailed
from .byte_plan import Plan
from .completions import to_answer
from .question import Answer, Question
from .token_texts import TokenTexts

MOST_IDS = 128
"""``logprob_token_ids`` of a request, at most: what vLLM takes."""

MOST_PROMPTS = 24
"""Contexts that are asked for in one request; each is billed as a prompt."""

Row = Mapping[int, float]
"""Log-probabilities by token id after one prompt."""


@dataclass(frozen=True)
class ServedQuestion:
    """One request.

    Attributes:
        prompts: token ids of each.
        ids: whose log-probabilities are wanted after each.
        read: the answer, from what is known after each prompt.
        texts: its tokens as text, for a server that wants or tells them so.
    """

    prompts: Sequence[Sequence[int]]
    ids: Sequence[int]
    read: Callable[[Sequence[Row]], Answer]
    texts: Callable[[], TokenTexts]

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts together."""
        return sum(map(len, self.prompts))


def by_tokens(question: Question, texts: Callable[[], TokenTexts]) -> ServedQuestion:
    """For a server with the SLM's tokenizer."""
    return ServedQuestion(
        [question.ids], question.candidates, lambda rows: to_answer(rows[0], question.candidates), texts
    )


def by_bytes(plan: Plan, texts: Callable[[], TokenTexts], *, tells: bool = True) -> ServedQuestion:
    """For a server with another tokenizer.

    Args:
        plan: what has to be scored.
        texts: of the server's tokens.
        tells: whether it scores the ids that it is given; if not, it is asked after one prompt alone.
    """
    covering, slm = plan.covering, plan.tokens.slm.view
    control = {token for each in plan.wanted if isinstance(each, frozenset) for token in each}
    ids, paths = _in_turn(control, covering.ids_that_count(slm)), covering.tree.paths()
    if tells and len(ids) <= MOST_IDS and len(paths) < MOST_PROMPTS:
        prompts = [plan.ids, *([*plan.ids, *path] for path in paths)]
        return ServedQuestion(prompts, ids, lambda rows: _exactly(plan, ids, rows), texts)
    end = covering.end.row
    some = _in_turn(control, covering.ids_at_end(slm))[:MOST_IDS]
    return ServedQuestion(
        [[*plan.ids, *(paths[end - 1] if end else ())]], some, lambda rows: _approximately(plan, rows[0]), texts
    )


def _in_turn(control: Iterable[int], of_each: Sequence[Sequence[int]]) -> list[int]:
    """Ids of control tokens, and then one of each candidate in turn."""
    return list(
        dict.fromkeys([*sorted(control), *(i for rank in zip_longest(*of_each) for i in rank if i is not None)])
    )


def _exactly(plan: Plan, ids: Sequence[int], rows: Sequence[Row]) -> Answer:
    if not all(i in row for row in rows for i in ids):  # a server that tells its best tokens alone
        return _approximately(plan, rows[plan.covering.end.row])
    return plan.answer(plan.covering.read_known(rows, len(plan.tokens.llm.view.bytes_of)), "exact")


def _approximately(plan: Plan, row: Row) -> Answer:
    answer = plan.answer(plan.covering.read_end(row), "approximate")
    if all(score is None or score == float("-inf") for score in answer.scores):
        raise EscalationFailed("none of the candidates begins with one of the tokens that the server told of.")
    return answer
