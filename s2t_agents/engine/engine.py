"""The engine: one generator of steps and waits. Everything else drains it, by a driver of ``scheduling.waits``.

propose   SLM logits, grammar mask, top-K candidates
trigger   is this step critical?
select    the local selector scores the candidates on the base's KV
escalate  still unsure, and the budget holds it: the LLM picks among the same K
emit      the step; the next token is computed only when the consumer asks for it
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from ..backends.torch.cpu_threads import single_threaded
from ..budget import Budget
from ..errors import ConfigError, ContextOverflow, InputError
from ..escalation import DEFAULT_MARGIN, Escalation, EscalationSession
from ..grammar.grammar import Grammar
from ..greedy import argmax
from ..llms.question import Answer, Conversation, Question, candidates_of
from ..proposal import Proposal, best_first
from ..scheduling.admission import AdmissionQueue, AdmissionTicket, Concurrency
from ..scheduling.deadline import Deadline
from ..scheduling.language_model import LanguageModel
from ..scheduling.sequence import TokenSequence
from ..scheduling.waits import Wait, Waiting, drive_blocking
from ..selectors.base import Selector, confidence_margin, scoring
from ..selectors.drift import AnswerCounts, DriftWatch
from ..triggers import Trigger, entropy
from ..types import Candidate, EscalationRecord, EscalationReport, Picker, Sampling, ShadowPick, Step, Timings
from .sampling import Draw

MAX_K = 64
DEFAULT_ENTROPY = 0.5
"""Nats from which a step is critical where nothing was calibrated."""


@dataclass(frozen=True)
class Selection:
    """A second look at one step: the scores that decide, who gave them, and what it took.

    ``then`` follows the best candidate: its continuation, which the LLM chose with it (a judge's is the SLM's own
    preview). ``instead`` is a token that the LLM wrote itself.
    """

    scores: Tensor
    picked_by: Picker
    candidates: tuple[Candidate, ...]
    escalation: EscalationReport | None
    select_s: float
    escalate_s: float
    then: tuple[int, ...] = ()
    instead: int | None = None


class GenerationOptions(TypedDict, total=False):
    """Keyword arguments of one generation.

    Attributes:
        grammar: what is legal; masks apply before the top-K.
        budget: what escalations may spend; None sets no limit.
        cache_scope: KV of past turns is shared within one scope only.
        on_asked: called after every question to the LLM, before its step comes. Where the generation ends with an error
            instead, as by an interruption, it was called for the question that has no step.
        begun: tokens that the completion begins with, as far as they are legal: they are not chosen again.
        conversation: what the prompt was made of, for an LLM with another tokenizer; without it such an LLM reads the
            prompt's text as a text and no conversation.
        deadline: ends its wait for a slot and the reading of its prompt; between steps the consumer ends it.
    """

    grammar: Grammar | None
    budget: Budget | None
    cache_scope: str | None
    on_asked: Callable[[EscalationRecord], None] | None
    begun: Sequence[int]
    conversation: Conversation | None
    deadline: Deadline | None


class Engine:
    """Generates with a small model, corrected at critical steps.

    Args:
        slm: proposes every token.
        k: candidates per critical step, 1 to 64.
        trigger: which steps are critical.
        selector: ranks candidates locally; None leaves the SLM's own order.
        escalation: the LLM to ask when the selector is unsure; None never asks.
        threshold: the selector's calibrated escalation margin.
        concurrency: how many generations run at once, and how many queue.
        drift: counts every answer's steps; warns when their rates leave the selector's calibration.
        shadow: every token is the SLM's own; selector and LLM are asked as ever, and what they say is reported alone.

    Raises:
        ConfigError: K out of range.
    """

    def __init__(
        self,
        slm: LanguageModel,
        *,
        k: int = 8,
        trigger: Trigger | None = None,
        selector: Selector | None = None,
        escalation: Escalation | None = None,
        threshold: float = DEFAULT_MARGIN,
        concurrency: Concurrency | None = None,
        drift: DriftWatch | None = None,
        shadow: bool = False,
    ) -> None:
        if not 1 <= k <= MAX_K:
            raise ConfigError(f"k is {k}; between 1 and {MAX_K} candidates can be scored at a step.")
        self.slm, self.k = slm, k
        self.trigger = entropy(above=DEFAULT_ENTROPY) if trigger is None else trigger
        self.selector, self.escalation, self.threshold = selector, escalation, threshold
        self.admission = AdmissionQueue(concurrency or Concurrency())
        self.drift, self.shadow = drift, shadow

    def steps(
        self, prompt: Sequence[int], sampling: Sampling | None = None, **options: Unpack[GenerationOptions]
    ) -> Iterator[Step]:
        """Continue a prompt, one step at a time; arguments and errors as ``generation``.

        Every wait blocks the consumer's thread. Closing the generator stops the model and the LLM session.
        """
        items = self.run(prompt, sampling, **options)
        with closing(items):
            for each in items:
                if isinstance(each, Step):
                    yield each

    def run(
        self, prompt: Sequence[int], sampling: Sampling | None = None, **options: Unpack[GenerationOptions]
    ) -> Generator[AdmissionTicket | Step, None, None]:
        """As ``steps``, but where it has to wait for a slot, its ticket comes first.

        The consumer may go on at once, and ``next`` blocks; or wait for ``AdmissionTicket.admitted`` first, without a
        thread.
        """
        return drive_blocking(self.generation(prompt, sampling, **options))

    def generation(
        self,
        prompt: Sequence[int],
        sampling: Sampling | None = None,
        *,
        grammar: Grammar | None = None,
        budget: Budget | None = None,
        cache_scope: str | None = None,
        on_asked: Callable[[EscalationRecord], None] | None = None,
        begun: Sequence[int] = (),
        conversation: Conversation | None = None,
        deadline: Deadline | None = None,
    ) -> Generator[Wait | Step, None, None]:
        """Continue a prompt until a stop token, the grammar's end or ``max_tokens``: its steps, and what it waits for.

        The consumer (a driver of ``scheduling.waits``) brings each wait about before it goes on. A stop token is
        emitted as the last step. ``GenerationOptions`` describes the keyword arguments.

        Args:
            prompt: token ids, at least one.
            sampling: how tokens are drawn; greedy by default.

        Raises:
            InputError: an empty prompt.
            ContextOverflow: the prompt leaves no room in the context window.
            BudgetExceeded: an escalation was refused and the budget says to raise.
            Overloaded: too many generations at once.
            S2TError: of the deadline.
        """
        sampling = sampling or Sampling()
        self.check_prompt(prompt)
        if self.shadow and budget is not None:
            budget = budget.view(on_exhausted="degrade")  # what no token depends on ends no answer
        with self.admission.enter(deadline) as ticket:
            if not ticket.admitted.done():
                yield ticket
            queued_s = ticket.wait()
            with (yield from TokenSequence.from_prefix_cache(self.slm, prompt, cache_scope, deadline)) as prefix:
                reused = len(prefix)
                escalations = (
                    self.escalation.open_session(
                        budget, threshold=self.threshold, on_asked=on_asked, conversation=conversation
                    )
                    if self.escalation
                    else nullcontext()
                )
                counting = self.drift.counting() if self.drift is not None else nullcontext()
                with escalations as session, counting as counts:
                    timings = Timings(queue=queued_s)
                    yield from self._loop(prefix, prompt[reused:], sampling, grammar, session, begun, timings, counts)

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Refuse a prompt by its length, as ``generation`` does.

        Raises:
            InputError: an empty prompt.
            ContextOverflow: the prompt leaves no room in the context window.
        """
        if not prompt:
            raise InputError("the prompt is empty: 0 tokens.", hint="Send at least one message.")
        window = self.slm.context_window
        if len(prompt) >= window:
            raise ContextOverflow(
                f"the prompt has {len(prompt)} tokens, the context window of the model {window}.",
                hint="Shorten or summarise the conversation.",
            )

    def _loop(
        self,
        prefix: TokenSequence,
        unread: Sequence[int],
        sampling: Sampling,
        grammar: Grammar | None,
        session: EscalationSession | None,
        begun: Sequence[int],
        before: Timings,
        counts: AnswerCounts | None,
    ) -> Generator[Wait | Step, None, None]:
        """All steps; the first tells what was ``before`` it, and how much of the prompt was cached."""
        reused = len(prefix)

        def emitted(step: Step) -> Step:
            if counts is not None:
                counts.add(step)
            if index:
                return step
            return replace(step, timings=replace(step.timings, queue=before.queue), reused_tokens=reused)

        draw, ends = Draw(sampling), self.slm.eos_ids if not sampling.ignore_eos else frozenset[int]()
        pending = list(unread)
        kept = deque(begun)
        length = len(prefix) + len(unread)
        room = min(sampling.max_tokens, self.slm.context_window - length)
        prefix.cache.expect(length + room)
        index = 0
        while index < room:
            for token, picker in predetermined(grammar, kept):
                yield emitted(Step(index, length + index, token, token, picker))
                if grammar and token not in ends:
                    grammar.accept(token)
                pending.append(token)
                index += 1
                if index >= room or token in ends:
                    return
            if grammar and grammar.finished:
                return
            with single_threaded():
                step = yield from self._step(index, prefix, pending, draw, grammar, session, kept)
            yield emitted(step)
            if step.token_id in ends:
                return
            if grammar:
                grammar.accept(step.token_id)
            pending = [step.token_id]
            index += 1

    def _step(
        self,
        index: int,
        prefix: TokenSequence,
        pending: list[int],
        draw: Draw,
        grammar: Grammar | None,
        session: EscalationSession | None,
        kept: deque[int],
    ) -> Waiting[Step]:
        used, started = prefix.compute.seconds, time.perf_counter()
        yield from prefix.appending(pending)
        computed = time.perf_counter()
        banned = draw.sampling.banned_first if index == 0 else ()
        may_rerank = self.selector is not None or session is not None
        reads_all = may_rerank or draw.random or draw.sampling.logprobs is not None or banned
        if not reads_all and self.slm.capabilities.all_logits:  # the best token alone: no mask
            token = self._best(prefix, grammar)
            compute, grammar_s = prefix.compute.seconds - used, time.perf_counter() - computed
            timings = Timings(propose=computed - started, grammar=grammar_s, compute=compute)
            return Step(index, len(prefix), token, token, "slm", timings=timings)
        allowed = grammar.allowed(prefix.logits) if grammar else self.slm.with_text
        if allowed is not None:
            prefix.ensure_legal_logits(allowed)
        masked = time.perf_counter()
        proposal = Proposal(prefix, self.k, allowed=allowed, banned=banned)
        if may_rerank:
            proposal.fetch()
        wanted = draw.one_of_all(proposal.logits) if draw.random else proposal.best
        triggered = may_rerank and self.trigger(proposal)
        entropy_nats = proposal.entropy if may_rerank else None
        propose_s = (computed - started) + (time.perf_counter() - masked)
        if not triggered:
            compute = prefix.compute.seconds - used
            timings = Timings(propose=propose_s, grammar=masked - computed, compute=compute)
            return Step(
                index,
                len(prefix),
                wanted,
                wanted,
                "slm",
                entropy=entropy_nats,
                timings=timings,
                logprobs=logprobs_of(proposal, wanted, draw.sampling),
            )
        chosen = yield from self._select(proposal, session, grammar)
        drawn = draw.random and not self.shadow  # whose draws are the SLM's alone
        at = draw.one_of(chosen.scores) if drawn else int(chosen.scores.argmax())
        token = chosen.candidates[at].token_id if chosen.instead is None else chosen.instead
        picked_by, shadow = chosen.picked_by, None
        if self.shadow:
            shadow = ShadowPick(token, picked_by, token != proposal.best)
            token, picked_by = wanted, "slm"
        else:
            kept.extend(chosen.then)
        return Step(
            index,
            len(prefix),
            token,
            wanted,
            picked_by,
            triggered=True,
            entropy=entropy_nats,
            candidates=chosen.candidates,
            escalation=chosen.escalation,
            shadow=shadow,
            logprobs=logprobs_of(proposal, token, draw.sampling),
            timings=Timings(
                propose=propose_s,
                grammar=masked - computed,
                select=chosen.select_s,
                escalate=chosen.escalate_s,
                compute=prefix.compute.seconds - used,
            ),
        )

    def _best(self, prefix: TokenSequence, grammar: Grammar | None) -> int:
        """The most likely legal token; mostly that is the most likely one."""
        seen, text = prefix.statistics, self.slm.with_text
        likeliest = seen.best if seen is not None else argmax(prefix.logits)
        if grammar:
            return grammar.best(prefix.logits, likeliest)
        if text is None or text[likeliest]:
            return likeliest
        return argmax(prefix.logits.masked_fill(~text, -torch.inf))

    def _select(
        self, proposal: Proposal, session: EscalationSession | None, grammar: Grammar | None
    ) -> Waiting[Selection]:
        """Rank the candidates locally; ask the LLM where that is not sure enough."""
        started = time.perf_counter()
        local = (yield from scoring(self.selector, proposal)) if self.selector is not None else None
        scores = (local if local is not None else proposal.candidate_log_probs).detach()
        picked_by: Picker = "selector" if local is not None else "slm"
        given, slm, found = fetched(scores, proposal.candidate_log_probs, proposal.candidates)
        own, ids = (given if local is not None else None), [int(each) for each in found]
        scores = torch.tensor(given, dtype=scores.dtype)
        selected = time.perf_counter()
        prefix = proposal.prefix
        question = Question(prefix.ids, ids, prefix=prefix, slm=slm, selector=own, grammar=grammar)
        answer, report = None, None
        if session is not None and len(ids) > 1 and session.should_escalate(confidence_margin(scores)):
            answer, report = yield from session.escalating(question)
        if answer is not None:
            scores, picked_by = decisive(answer), "llm"
        candidates = candidates_of(question, answer)
        done = time.perf_counter()
        then, instead = (answer.then, answer.instead) if answer else ((), None)
        return Selection(scores, picked_by, candidates, report, selected - started, done - selected, then, instead)


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
    scores = proposal.log_probs
    if sampling.logprob_ids:
        ids = torch.tensor(sampling.logprob_ids, device=scores.device)
    else:
        ids = best_first(scores, sampling.logprobs)[1][: sampling.logprobs]  # of none, too, it gives the best
    ranked = zip(map(int, ids.tolist()), scores[ids].tolist(), strict=True)
    return ((token, float(scores[token])), *((each, score) for each, score in ranked if score > -torch.inf))
