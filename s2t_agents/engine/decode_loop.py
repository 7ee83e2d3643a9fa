"""The loop that generates an answer: propose, trigger, select, escalate, emit, once a step.

propose   SLM logits, grammar mask, top-K candidates
trigger   is this step critical?
select    the local selector scores the candidates on the base's KV
escalate  still unsure, and the budget holds it: the LLM picks among the same K
emit      the step; the next token is computed only when the consumer asks for it
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..backends.cpu_threads import single_threaded
from ..escalation import EscalationSession
from ..grammar.grammar import Grammar
from ..greedy import argmax
from ..llms.question import Answer, Question, candidates_of
from ..proposal import Proposal, best_first
from ..scheduling.compute_time import ComputeTime
from ..scheduling.sequence import TokenSequence
from ..scheduling.waits import Wait, Waiting
from ..selectors.base import Selector, confidence_margin, scoring
from ..selectors.drift import AnswerCounts
from ..triggers import Trigger
from ..types import EscalationReport, Picker, Sampling, ShadowPick, Step, Timings
from .sampling import Draw


@dataclass
class Selection:
    """The candidates of a critical step, and who ranked them last.

    Attributes:
        question: the candidates with the SLM's and the selector's scores, as the LLM is asked about them.
        scores: ``[K]`` that decide; the highest wins.
        picked_by: who gave them.
        answer: the LLM's; None where it was not asked or gave none.
        report: of the escalation; None where there was none.
    """

    question: Question
    scores: Tensor
    picked_by: Picker
    answer: Answer | None = None
    report: EscalationReport | None = None


class StepTimer:
    """Seconds of one step by part, each from the end of the one before.

    Args:
        compute: of the sequence.
    """

    def __init__(self, compute: ComputeTime) -> None:
        self._compute, self._used = compute, compute.seconds
        self._parts: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, part: str) -> None:
        """All time since the last lap went to this part, one of ``Timings``."""
        now = time.perf_counter()
        self._parts[part] = self._parts.get(part, 0.0) + now - self._since
        self._since = now

    def timings(self) -> Timings:
        """Of the step so far."""
        return Timings(**self._parts, compute=self._compute.seconds - self._used)


@dataclass
class DecodeLoop:
    """Generates one answer after a prefix.

    Attributes:
        prefix: the sequence, which the answer extends.
        sampling: how tokens are drawn.
        k: candidates per critical step.
        trigger: which steps are critical.
        selector: ranks candidates locally; None leaves the SLM's own order.
        escalation: asks the LLM where the local ranking is unsure; None never asks.
        grammar: what is legal; masks apply before the top-K.
        begun: tokens that the answer begins with, as far as they are legal: they are not chosen again.
        shadow: every token is the SLM's own; what selector and LLM say is reported alone.
        counts: counts the steps; None counts none.
        queued_s: seconds that the answer waited for its slot, told with its first step.
    """

    prefix: TokenSequence
    sampling: Sampling
    k: int
    trigger: Trigger
    selector: Selector | None
    escalation: EscalationSession | None
    grammar: Grammar | None
    begun: Sequence[int]
    shadow: bool
    counts: AnswerCounts | None
    queued_s: float

    def __post_init__(self) -> None:
        self._slm, self._draw = self.prefix.model, Draw(self.sampling)
        self._reranks = self.selector is not None or self.escalation is not None
        self._ends = frozenset[int]() if self.sampling.ignore_eos else self._slm.eos_ids
        self._kept = deque(self.begun)  # come next without a choice, while they are legal
        self._reused = None if self._slm.capabilities.concurrent_forwards else len(self.prefix)
        self._index = 0

    def steps(self, unread: Sequence[int]) -> Generator[Wait | Step, None, None]:
        """All steps, and what they wait for, until a stop token, the grammar's end or ``max_tokens``.

        Args:
            unread: the prompt's tokens that the prefix lacks, at least one.
        """
        grammar, pending = self.grammar, list(unread)
        length = len(self.prefix) + len(unread)
        room = min(self.sampling.max_tokens, self._slm.context_window - length)
        self.prefix.cache.expect(length + room)
        while self._index < room:
            for token, picker in predetermined(grammar, self._kept):
                yield self._counted(Step(self._index, length + self._index, token, token, picker))
                if grammar and token not in self._ends:
                    grammar.accept(token)
                pending.append(token)
                self._index += 1
                if self._index >= room or token in self._ends:
                    return
            if grammar and grammar.finished:
                return
            with single_threaded():
                step = yield from self._step(pending)
            yield self._counted(step)
            if step.token_id in self._ends:
                return
            if grammar:
                grammar.accept(step.token_id)
            pending = [step.token_id]
            self._index += 1

    def _step(self, pending: Sequence[int]) -> Waiting[Step]:
        timer = StepTimer(self.prefix.compute)
        wanted, proposal = yield from self._propose(pending, timer)
        selection = None
        if proposal is not None and self._reranks and self.trigger(proposal):
            timer.lap("propose")
            selection = yield from self._select(proposal)
            timer.lap("select")
            yield from self._escalate(selection)
            timer.lap("escalate")
        return self._emit(wanted, proposal, selection, timer)

    def _propose(self, pending: Sequence[int], timer: StepTimer) -> Waiting[tuple[int, Proposal | None]]:
        """The SLM's own token and its proposal; None where nothing but the best token is read, which needs no mask."""
        prefix, grammar, draw = self.prefix, self.grammar, self._draw
        yield from prefix.appending(pending)
        timer.lap("propose")
        banned = self.sampling.banned_first if self._index == 0 else ()
        reads_all = self._reranks or draw.random or self.sampling.logprobs is not None
        if not reads_all and self._slm.capabilities.all_logits and (token := self._best()) not in banned:
            timer.lap("grammar")
            return token, None
        if grammar and not self._slm.capabilities.all_logits and (legal := grammar.legal()) is not None:
            prefix.ensure_legal_logits(legal)  # first: near its limit the grammar tries the likeliest
        allowed = grammar.allowed(prefix.logits) if grammar else self._slm.with_text
        if allowed is not None:
            prefix.ensure_legal_logits(allowed)
        timer.lap("grammar")
        proposal = Proposal(prefix, self.k, allowed=allowed, banned=banned)
        if self._reranks:
            proposal.fetch()
        return draw.one_of(proposal.logits) if draw.random else proposal.best, proposal

    def _best(self) -> int:
        """The most likely legal token; mostly that is the most likely one."""
        logits, seen, text = self.prefix.logits, self.prefix.statistics, self._slm.with_text
        likeliest = seen.best if seen is not None else argmax(logits)
        if self.grammar:
            return self.grammar.best(logits, likeliest)
        if text is None or text[likeliest]:
            return likeliest
        return argmax(logits.masked_fill(~text, -torch.inf))

    def _select(self, proposal: Proposal) -> Waiting[Selection]:
        """The candidates, ranked locally."""
        local = (yield from scoring(self.selector, proposal)) if self.selector is not None else None
        scores = (local if local is not None else proposal.candidate_log_probs).detach()
        ranked, slm, found = fetched(scores, proposal.candidate_log_probs, proposal.candidates)
        question = Question(
            self.prefix.ids,
            [int(each) for each in found],
            prefix=self.prefix,
            slm=slm,
            selector=ranked if local is not None else None,
            grammar=self.grammar,
        )
        picked_by: Picker = "selector" if local is not None else "slm"
        return Selection(question, torch.tensor(ranked, dtype=scores.dtype), picked_by)

    def _escalate(self, selection: Selection) -> Waiting[None]:
        """Ask the LLM where the local ranking is not sure enough; its scores decide, if it gives any."""
        if self.escalation is None or len(selection.question.candidates) == 1:
            return
        if self.escalation.should_escalate(confidence_margin(selection.scores)):
            selection.answer, selection.report = yield from self.escalation.escalating(selection.question)
        if selection.answer is not None:
            selection.scores, selection.picked_by = decisive(selection.answer), "llm"

    def _emit(self, wanted: int, proposal: Proposal | None, selection: Selection | None, timer: StepTimer) -> Step:
        """The step: the selection's token, or else the SLM's own."""
        token, shadow = wanted, None
        picked_by: Picker = "slm"
        if selection is not None and self.shadow:
            would = self._token_of(selection)
            shadow = ShadowPick(would, selection.picked_by, would != selection.question.candidates[0])
        elif selection is not None:
            token, picked_by = self._token_of(selection), selection.picked_by
            self._kept.extend(selection.answer.then if selection.answer else ())
        entropy = proposal.entropy if proposal is not None and self._reranks else None
        logprobs = logprobs_of(proposal, token, self.sampling) if proposal is not None else ()
        candidates = candidates_of(selection.question, selection.answer) if selection is not None else ()
        timer.lap("propose")
        return Step(
            self._index,
            len(self.prefix),
            token,
            wanted,
            picked_by,
            triggered=selection is not None,
            entropy=entropy,
            candidates=candidates,
            escalation=selection.report if selection is not None else None,
            timings=timer.timings(),
            logprobs=logprobs,
            shadow=shadow,
        )

    def _token_of(self, selection: Selection) -> int:
        """The best of the candidates, or one drawn of them by their scores; or what the LLM wrote itself."""
        if selection.answer is not None and selection.answer.instead is not None:
            return selection.answer.instead
        drawn = self._draw.random and not self.shadow  # whose draws are the SLM's alone
        at = self._draw.one_of(selection.scores) if drawn else int(selection.scores.argmax())
        return selection.question.candidates[at]

    def _counted(self, step: Step) -> Step:
        """The step, counted; the first tells what was before it, and how much of the prompt was cached, if here."""
        if self.counts is not None:
            self.counts.add(step)
        if step.index:
            return step
        return replace(step, timings=replace(step.timings, queue=self.queued_s), reused_tokens=self._reused)


def fetched(*rows: Tensor) -> list[list[float]]:
    """Several ``[K]`` as lists; from CUDA in one trip."""
    return in_one_trip(*rows) if rows[0].device.type == "cuda" else [row.tolist() for row in rows]


def in_one_trip(*rows: Tensor) -> list[list[float]]:
    """Several ``[K]`` as lists, with a single wait for the device; float64 holds float32 scores and ids exactly."""
    values: list[list[float]] = torch.stack([row.double().to(rows[0].device) for row in rows]).tolist()
    return values


def decisive(answer: Answer) -> Tensor:
    """``[K]``: the LLM's scores; a candidate that it gave none cannot be chosen."""
    return torch.tensor([-torch.inf if score is None else score for score in answer.scores])


def predetermined(grammar: Grammar | None, kept: deque[int]) -> Iterator[tuple[int, Picker]]:
    """Tokens that need no choice: forced by the grammar, or kept with an earlier pick while legal.

    The consumer lets the grammar accept each before it asks for the next.
    """
    while True:
        for token in grammar.forced() if grammar else ():
            if kept and kept.popleft() != token:
                kept.clear()
            yield token, "grammar"
        if not kept or (grammar and not grammar.takes(kept[0])):
            kept.clear()
            return
        yield kept.popleft(), "slm"


def logprobs_of(proposal: Proposal, token: int, sampling: Sampling) -> tuple[tuple[int, float], ...]:
    """A step's ``logprobs``: of a token, then of those that are asked for, as far as they are legal."""
    if sampling.logprobs is None:
        return ()
    scores = proposal.reported_log_probs
    if sampling.logprob_ids:
        ids = torch.tensor(sampling.logprob_ids, device=scores.device)
    else:
        ids = best_first(scores, sampling.logprobs)[1][: sampling.logprobs]  # of none, too, it gives the best
    ranked = zip(map(int, ids.tolist()), scores[ids].tolist(), strict=True)
    return ((token, float(scores[token])), *((each, score) for each, score in ranked if score > -torch.inf))
