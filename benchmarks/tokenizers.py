"""An LLM with another tokenizer, asked by bytes: tokens read, seconds, and agreement with every way to write them.

A chat model answers word problems and the LLM picks at every critical step. Each question is put in three ways, the
first two in turn before each other: by bytes as the package does; as an LLM of the same tokenizer is asked, which is
one forward over the same text's new tokens on the same weights; and, for some, with every byte of the open end and the
candidates as a place where a token may end (*every place*): the sum over all paths of tokens, whatever the tokenizer.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from math import inf
from pathlib import Path
from typing import Any

from langchain_core.messages import convert_to_messages
from rich.console import Group
from rich.table import Table

from s2t_agents import ChatS2T
from s2t_agents.demo.world import generate
from s2t_agents.escalation import Escalation
from s2t_agents.llms import LocalLLM
from s2t_agents.llms.byte_plan import Planner
from s2t_agents.llms.byte_session import ByteSession
from s2t_agents.llms.covering import Covering, Places
from s2t_agents.llms.kept_prefix import KeptPrefix
from s2t_agents.llms.question import Answer, Question
from s2t_agents.llms.served_question import MOST_IDS, by_bytes
from s2t_agents.llms.token_map import TokenMap
from s2t_agents.llms.token_texts import TokenTexts
from s2t_agents.scheduling.language_model import LanguageModel
from s2t_agents.scheduling.sequence import TokenSequence
from s2t_agents.scheduling.waits import finish
from s2t_agents.triggers import entropy
from s2t_agents.types import Charge, Price

from .readme import TOKENIZER_ROWS

K = 8
ABOVE = 0.5
"""Nats from which a step is critical."""
EVERY = 4
"""One question of so many is also put with every place."""


class EveryPlace(Places):
    """A token may end after every byte."""

    def may_end(self, ids: Sequence[int], span: tuple[int, int]) -> bool:
        """Always."""
        return True


@dataclass
class Asked:
    """One question.

    Attributes:
        first: of its answer: the prompt is read with it.
        read: tokens of the LLM, those of the tree included.
        tree: of these, tokens of the tree.
        same_read: tokens that an LLM of the same tokenizer reads.
        cpu_s: CPU seconds by bytes.
        same_cpu_s: CPU seconds of the same tokenizer's question.
        agrees: whether the pick with every place is the same; None where it was not asked.
        apart: how far the two log-probabilities of the pick are apart; None likewise.
        served: prompts of the one request to a server that scores ``MOST_IDS`` ids; 1 where it can only be approximate.
        served_exactly: whether that request is exact.
        served_agrees: whether the pick by one prompt and ``MOST_IDS`` ids is the same.
    """

    first: bool
    read: int
    tree: int
    same_read: int
    cpu_s: float
    same_cpu_s: float
    agrees: bool | None = None
    apart: float | None = None
    served: int = 0
    served_exactly: bool = False
    served_agrees: bool = False


@dataclass
class Measured:
    """The LLM of a chat model, measured; see ``base.LLMSelector``."""

    llm: LocalLLM
    slm: LanguageModel
    asked: list[Asked] = field(default_factory=list)
    name: str = "measured"
    price: Price | None = None

    def check(self, slm: LanguageModel) -> None:
        """Nothing to compare."""

    def open(self) -> MeasuredSession:
        """A session of both ways."""
        tokens = self.llm.token_map(self.slm)
        assert tokens is not None, "these models have the same tokens"
        return MeasuredSession(self, tokens)


class MeasuredSession:
    """See ``base.LLMSession``."""

    def __init__(self, measured: Measured, tokens: TokenMap) -> None:
        self._of, self._tokens = measured, tokens
        llm, self._planner = measured.llm, Planner(measured.llm.name, tokens)
        self._session = ByteSession(llm.name, llm.price, KeptPrefix(llm.load, llm.idle), tokens)
        self._same, self._every = TokenSequence(measured.llm.load()), TokenSequence(measured.llm.load())
        self._first, self._planned_s = True, 0.0

    def quote(self, question: Question) -> Charge:
        """As asked by bytes; what is planned here is part of the question's time."""
        started = time.process_time()
        found = self._session.quote(question)
        self._planned_s = time.process_time() - started
        return found

    def ask(self, question: Question) -> Answer:
        """By bytes, and measured."""
        text, before = self._texts(question)
        if len(self._of.asked) % 2:
            same_s, same_read = self._timed_same(before, text)
            cpu_s, answer = self._timed(question)
        else:
            cpu_s, answer = self._timed(question)
            same_s, same_read = self._timed_same(before, text)
        owed = question.owed
        assert owed is not None
        tokens = self._tokens
        candidates = [data for each in question.candidates if isinstance(data := tokens.of(each), bytes)]
        plan = self._planner.plan(question)
        tree, request = len(plan.covering.tree.ids), by_bytes(plan, lambda: TokenTexts(tokens.llm, self._of.llm.name))
        found = Asked(self._first, owed.llm_tokens - 1, tree, same_read, cpu_s, same_s)
        found.served, found.served_exactly = (
            len(request.prompts),
            len(request.prompts) == tree + 1 and (tree > 0 or len(request.ids) < MOST_IDS),
        )
        known = self._same.logits.log_softmax(0)
        some = [i for rank in zip_longest(*plan.covering.ids_at_end(tokens.slm.view)) for i in rank if i is not None]
        ends = tokens.llm.eos_ids
        near = plan.covering.read_end({i: float(known[i]) for i in [*ends, *dict.fromkeys(some)][:MOST_IDS]})
        given = [score if score is not None else -inf for score in answer.scores]
        approximate = [-inf if score is None else score for score in plan.answer(near, "").scores]
        found.served_agrees = approximate.index(max(approximate)) == given.index(max(given))
        if len(self._of.asked) % EVERY == 0 and len(candidates) == len(question.candidates):
            scores = self._every_place(before, text, candidates)
            pick = given.index(max(given))
            found.agrees, found.apart = pick == scores.index(max(scores)), abs(given[pick] - scores[pick])
        self._of.asked.append(found)
        self._first = False
        return answer

    def close(self) -> None:
        """Give the caches back."""
        self._session.close()
        self._same.close()
        self._every.close()

    def _texts(self, question: Question) -> tuple[bytes, list[int]]:
        """The answer's text so far, and the LLM's tokens before it."""
        conversation, side = question.conversation, self._tokens.llm
        assert conversation is not None
        *_, last = self._tokens.runs(question.ids[conversation.prompt_tokens :])
        return last.text, conversation.prompt_for(side.tokenizer, side.template, side.reasoning)

    def _timed(self, question: Question) -> tuple[float, Answer]:
        started = time.process_time()
        answer = self._session.ask(question)
        return self._planned_s + time.process_time() - started, answer

    def _timed_same(self, before: list[int], text: bytes) -> tuple[float, int]:
        ids = [*before, *self._tokens.llm.view.encode(text)]
        started = time.process_time()
        read = finish(self._same.moving_to(ids))
        self._same.logits.log_softmax(0)[:K].tolist()
        return time.process_time() - started, read

    def _every_place(self, before: list[int], text: bytes, candidates: Sequence[bytes]) -> list[float]:
        covering = Covering(EveryPlace(self._tokens.llm.view), text, candidates)
        tree = covering.tree
        logits = finish(self._every.moving_to_tree([*before, *covering.trunk], tree.ids, tree.parents))
        return covering.read(logits).log_probs_of_tokens(self._tokens.slm.view)


def run(
    slm: str,
    llm: str,
    n: int,
    seed: int = 0,
    *,
    max_tokens: int = 64,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Answer problems and measure every question.

    Args:
        slm: path of the SLM, with a chat template.
        llm: path of an LLM with another tokenizer.
        n: problems.
        seed: of the first.
        max_tokens: of an answer.
        say: told the findings so far after each problem.
    """
    small = LanguageModel.load(slm)
    measured = Measured(LocalLLM(llm), small)
    chat = ChatS2T(
        model=small,
        escalation=Escalation(measured, margin=1.0),
        trigger=entropy(above=ABOVE),
        k=K,
        max_tokens=max_tokens,
    )
    tokens = 0
    for at in range(n):
        answer = chat.invoke(convert_to_messages(generate(seed + at, "heldout", "word").prompt))
        tokens += answer.response_metadata["s2t"]["tokens"]
        if any(not each.first for each in measured.asked):
            say(json.dumps(summary(measured.asked)))
    return {"slm": Path(slm).name, "llm": Path(llm).name, "problems": n, "tokens": tokens, **summary(measured.asked)}


def summary(asked: Sequence[Asked]) -> dict[str, Any]:
    """Means and 95th percentiles; questions after the first of an answer, but for the agreement."""
    later = [each for each in asked if not each.first]
    compared = [each for each in asked if each.agrees is not None]
    return {
        "questions": len(asked),
        "later": len(later),
        "read": _spread([each.read for each in later]),
        "tree": _spread([each.tree for each in later]),
        "same_read": _spread([each.same_read for each in later]),
        "cpu_ms": _spread([1e3 * each.cpu_s for each in later]),
        "same_cpu_ms": _spread([1e3 * each.same_cpu_s for each in later]),
        "ratio": sum(each.cpu_s for each in later) / sum(each.same_cpu_s for each in later),
        "compared": len(compared),
        "agree": sum(bool(each.agrees) for each in compared),
        "served": _spread([each.served for each in asked]),
        "served_exactly": sum(each.served_exactly for each in asked),
        "served_asked": len(asked),
        "served_agree": sum(each.served_agrees for each in asked),
        "apart": _spread([each.apart for each in compared if each.apart is not None]),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, median, 95th percentile and maximum."""
    ordered = sorted(values)
    p95 = ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))]
    return {"mean": statistics.fmean(values), "median": statistics.median(values), "p95": p95, "max": ordered[-1]}


def table(report: dict[str, Any]) -> Group:
    """The report for people."""
    shown = Table(title=f"{report['later']} questions after the first of an answer")
    for head in ("", "mean", "median", "p95", "max"):
        shown.add_column(head)
    for key, name in TOKENIZER_ROWS.items():
        values = report[key]
        shown.add_row(name, *(f"{values[each]:.3g}" for each in ("mean", "median", "p95", "max")))
    agree = f"{report['agree']} of {report['compared']} picks are those with every place"
    served = (
        f"Over HTTP {report['served_exactly']} of {report['questions']} are exact in one request; by one prompt and"
        f" {MOST_IDS} ids {report['served_agree']} picks are the same."
    )
    return Group(shown, f"CPU seconds: {report['ratio']:.2f} times the same tokenizer's; {agree}. {served}")
