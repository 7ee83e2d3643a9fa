"""Data types of the whole package: candidate, step, escalation report, sampling parameters. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from numbers import Integral, Real
from typing import Literal, Protocol

from .errors import ConfigError

Picker = Literal["slm", "selector", "llm", "grammar"]
"""What chose a token. ``grammar``: it was the only legal one. Tokens emitted together with an LLM's pick are the SLM's
continuation of it, and have ``slm``."""

Outcome = Literal["picked", "refused", "failed", "interrupted"]
"""Outcome of an escalation: the LLM picked; the budget refused it; the LLM gave no usable answer; or the caller was
interrupted (Ctrl-C, a cancelled task)."""


MAX_LOGPROBS = 20
"""Likeliest tokens that a step reports log-probabilities of, at most."""


class Price(Protocol):
    """What tokens of one model cost."""

    def cost(
        self,
        *,
        input_tokens: int,
        cached_tokens: int = 0,
        output_tokens: int = 0,
        cache_write_tokens: int = 0,
        cache_write_1h_tokens: int = 0,
    ) -> Decimal:
        """USD of a request.

        ``cached_tokens`` are those input tokens that were in the server's prefix cache, ``cache_write_tokens`` those
        that it has written to it, ``cache_write_1h_tokens`` the ones of these that it keeps for an hour.
        """
        ...


@dataclass(frozen=True, slots=True)
class Candidate:
    """One of a step's K candidates with its scores (log-probabilities; None: not scored)."""

    token_id: int
    slm: float
    selector: float | None = None
    llm: float | None = None


@dataclass(frozen=True, slots=True)
class Charge:
    """What a budget holds or settles, by default for one escalation. A budget checks it when it reserves or settles.

    Attributes:
        usd: US dollars; None where the price is unknown, which a dollar limit refuses. Free is 0.
        llm_tokens: tokens that the LLM reads, those it had cached left out, and writes.
        escalations: questions to the LLM.
        answers: answers of the local model.
        answer_tokens: tokens that the local model generates.
    """

    usd: Decimal | None = None
    llm_tokens: int = 0
    escalations: int = 1
    answers: int = 0
    answer_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RefusedBy:
    """The limit that a reservation exceeded.

    Attributes:
        budget: the path of the budget with that limit, as ``fleet/run``.
        unit: ``"usd" | "escalations" | "llm_tokens" | "answers" | "answer_tokens" | "seconds"``.
        limit: in that unit; dollars as Decimal, counts as int, seconds as float.
    """

    budget: str
    unit: str
    limit: Decimal | int | float


@dataclass(frozen=True, slots=True)
class LimitWarning:
    """A limit of which a share is spent.

    Attributes:
        budget: the path of the budget with that limit, as ``fleet/run``.
        unit: as ``RefusedBy.unit``.
        limit: in that unit; dollars as Decimal, counts as int, seconds as float.
        spent: settled so far, in that unit; for seconds those that have passed.
    """

    budget: str
    unit: str
    limit: Decimal | int | float
    spent: Decimal | int | float


@dataclass(frozen=True, slots=True)
class EscalationReport:
    """The report of one escalation, part of its step.

    Attributes:
        outcome: picked, refused, failed or interrupted.
        reserved: reserved before the LLM was asked; if the budget refused, what was to be reserved; None if unknown.
        actual: settled afterwards; None if nothing was spent.
        wait_s: seconds from question to answer.
        reason: why it was refused, failed or was interrupted; a remark if the LLM picked, mostly "".
        refused_by: the limit that refused; None if no limit did, for example because the budget store was unreachable.
        replayed: the LLM picked in an earlier, interrupted try of this answer, which paid for it.
    """

    outcome: Outcome
    reserved: Charge | None
    actual: Charge | None
    wait_s: float
    reason: str = ""
    refused_by: RefusedBy | None = None
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class EscalationRecord:
    """An escalation with its candidates, reported as soon as it ends: its step may never be emitted.

    Attributes:
        prefix_tokens: tokens before the step, prompt included.
        candidates: the K candidates, the SLM's best first.
        report: its outcome.
    """

    prefix_tokens: int
    candidates: tuple[Candidate, ...]
    report: EscalationReport


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds spent in each part of one step.

    ``queue`` is the wait before a generation's first step. ``compute`` is the step's share, by rows, of the SLM's
    batched forward passes that it was part of; local compute is billed by it.
    """

    propose: float = 0.0
    grammar: float = 0.0
    select: float = 0.0
    escalate: float = 0.0
    queue: float = 0.0
    compute: float = 0.0


@dataclass(frozen=True, slots=True)
class ShadowPick:
    """What would have been picked at a step in shadow mode, where the SLM's token stands.

    Attributes:
        token_id: the token.
        picked_by: what would have picked it.
        flipped: whether it is another than the SLM's best.
    """

    token_id: int
    picked_by: Picker
    flipped: bool


@dataclass(frozen=True, slots=True)
class Step:
    """One emitted token and how it was chosen.

    Attributes:
        index: position in the completion, from 0.
        prefix_tokens: tokens before it, prompt included.
        token_id: the chosen token.
        wanted_id: the token that the SLM alone would have chosen.
        picked_by: what chose it.
        triggered: whether the trigger fired at this step.
        entropy: of the SLM's (grammar-masked) next-token distribution, in nats; None for forced tokens.
        candidates: the K candidates, the SLM's best first; empty if they were not re-ranked.
        escalation: set if the selection was to be escalated to the LLM.
        timings: seconds by part.
        reused_tokens: prompt tokens whose KV came from the prefix cache; set on the first step, 0 later; None where the
            model is on a server, whose own cache it is.
        shadow: what would have been picked instead, at triggered steps in shadow mode.
        logprobs: the SLM's log-probabilities over the legal tokens, as (token id, log-probability): the chosen token,
            then the likeliest, or ``Sampling.logprob_ids``; empty where ``Sampling`` does not ask for them and where
            the SLM computed none.
    """

    index: int
    prefix_tokens: int
    token_id: int
    wanted_id: int
    picked_by: Picker
    triggered: bool = False
    entropy: float | None = None
    candidates: tuple[Candidate, ...] = ()
    escalation: EscalationReport | None = None
    timings: Timings = field(default_factory=Timings)
    reused_tokens: int | None = 0
    logprobs: tuple[tuple[int, float], ...] = ()
    shadow: ShadowPick | None = None

    @property
    def flipped(self) -> bool:
        """Whether the token differs from the SLM's choice."""
        return self.token_id != self.wanted_id


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters.

    Attributes:
        temperature: 0 is greedy.
        top_p: nucleus mass, in (0, 1]; used when temperature is above 0. Where candidates were ranked again, it is that
            of their new scores.
        seed: of the random generator; None takes a random one.
        max_tokens: limit of the completion, in tokens.
        banned_first: token ids that cannot be the first, such as end tokens (no empty answers).
        logprobs: how many of the likeliest tokens each step reports log-probabilities of, beside the chosen token's;
            None reports none.
        logprob_ids: tokens whose log-probabilities each step reports in place of the likeliest's.
        ignore_eos: go on after tokens that end an answer, up to ``max_tokens``.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int = 512
    banned_first: Sequence[int] = ()
    logprobs: int | None = None
    logprob_ids: Sequence[int] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Validate the parameters (ConfigError)."""
        if not (isinstance(self.temperature, Real) and math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature is {self.temperature!r}; it must be 0 (greedy) or a positive number.")
        if not (isinstance(self.top_p, Real) and 0 < self.top_p <= 1):
            raise ConfigError(f"top_p is {self.top_p!r}; it must lie in (0, 1].")
        if not (isinstance(self.max_tokens, Integral) and self.max_tokens >= 1):
            raise ConfigError(f"max_tokens is {self.max_tokens!r}; at least 1 token is needed for an answer.")
        seed = self.seed
        whole = isinstance(seed, Integral) and not isinstance(seed, bool)
        if seed is not None and not (whole and -(2**63) <= seed < 2**64):
            raise ConfigError(f"seed is {self.seed!r}; it must be a whole number of 64 bits.")
        top = self.logprobs
        whole = isinstance(top, Integral) and not isinstance(top, bool)
        if top is not None and not (whole and 0 <= top <= MAX_LOGPROBS):
            raise ConfigError(f"top_logprobs is {top!r}; it must be a whole number from 0 to {MAX_LOGPROBS}.")
