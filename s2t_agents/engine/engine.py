"""The engine: one generator of steps and waits. Everything else drains it, by a driver of ``scheduling.waits``.

A generation waits for its slot, takes what the prefix cache has of its prompt, and runs the loop of ``decode_loop``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from typing import TypedDict, Unpack

from ..backends.deadline import Deadline
from ..budget import Budget
from ..errors import ConfigError, ContextOverflow, InputError
from ..escalation import DEFAULT_MARGIN, Escalation
from ..grammar.grammar import Grammar
from ..llms.question import Conversation
from ..scheduling.admission import AdmissionQueue, AdmissionTicket, Concurrency
from ..scheduling.language_model import LanguageModel
from ..scheduling.sequence import TokenSequence
from ..scheduling.waits import Wait, Waiting, drive_blocking
from ..selectors.base import Selector
from ..selectors.drift import DriftWatch
from ..triggers import Trigger, entropy
from ..types import EscalationRecord, Sampling, Step
from .decode_loop import DecodeLoop

MAX_K = 64
DEFAULT_ENTROPY = 0.5
"""Nats from which a step is critical where nothing was calibrated."""


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
        deadline: ends its wait for a slot, the reading of its prompt and its questions to the LLM; between steps the
            consumer ends it.
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
        ConfigError: K out of range; trigger or selector needs what the SLM's backend cannot do.
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
        for each in (self.trigger, selector):
            slm.require(*getattr(each, "needs", ()))
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
                escalations = (
                    self.escalation.open_session(
                        budget,
                        threshold=self.threshold,
                        on_asked=on_asked,
                        conversation=conversation,
                        deadline=deadline,
                    )
                    if self.escalation
                    else nullcontext()
                )
                counting = self.drift.counting() if self.drift is not None else nullcontext()
                with escalations as session, counting as counts:
                    loop = DecodeLoop(
                        prefix,
                        sampling,
                        k=self.k,
                        trigger=self.trigger,
                        selector=self.selector,
                        escalation=session,
                        grammar=grammar,
                        begun=begun,
                        shadow=self.shadow,
                        counts=counts,
                        queued_s=queued_s,
                    )
                    yield from loop.steps(prompt[len(prefix) :])

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


def steps_of(generation: Generator[Wait | Step, None, None]) -> Waiting[list[Step]]:
    """All steps of an ``Engine.generation``, for ``scheduling.waits.gather``, or to ``yield from``."""
    steps: list[Step] = []
    try:
        item = next(generation)
        while True:
            if isinstance(item, Step):
                steps.append(item)
                item = next(generation)
                continue
            try:
                yield item
            except BaseException as error:  # noqa: BLE001 - the generation's own
                item = generation.throw(error)
            else:
                item = next(generation)
    except StopIteration:
        return steps
