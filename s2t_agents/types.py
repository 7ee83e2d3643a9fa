"""The words the whole package speaks: candidate, step, what became of an escalation. Plain data, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from numbers import Integral, Real
from typing import Literal, Protocol

from .errors import ConfigError

Picker = Literal["slm", "selector", "llm", "grammar"]
"""Who chose a token. ``grammar``: it was the only legal one, so nobody had to. Tokens that were kept with an LLM's
pick are the SLM's own continuation of it, and carry ``slm``."""

Outcome = Literal["picked", "refused", "failed", "interrupted"]
"""What became of an escalation: the LLM picked, the budget refused it, the LLM gave no usable answer, or the caller
left (Ctrl-C, a cancelled task) before there was one."""


class Price(Protocol):
    """What tokens of one model cost."""

    def cost(self, *, input_tokens: int, cached_tokens: int = 0, output_tokens: int = 0) -> Decimal:
        """USD for so many tokens; ``cached_tokens`` are those of the input that the server had already seen."""
        ...


@dataclass(frozen=True, slots=True)
class Candidate:
    """One of the K tokens of a step, with every score it was given (log-probabilities; None: not asked)."""

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
    """

    usd: Decimal | None = None
    llm_tokens: int = 0
    escalations: int = 1


@dataclass(frozen=True, slots=True)
class RefusedBy:
    """The limit that a reservation did not fit in.

    Attributes:
        budget: the path of the budget that has it, as ``fleet/run``.
        unit: ``"usd" | "escalations" | "llm_tokens" | "seconds"``.
        limit: in that unit; dollars as Decimal, counts as int, seconds as float.
    """

    budget: str
    unit: str
    limit: Decimal | int | float


@dataclass(frozen=True, slots=True)
class EscalationReport:
    """One escalation, asked or refused, as the step carries it.

    Attributes:
        outcome: picked, refused, failed or interrupted.
        reserved: held before the LLM was asked, or, where the budget refused, what it was asked to hold; None when
            that was not known yet.
        actual: settled afterwards; None when nothing was spent.
        wait_s: seconds from the question to the answer.
        reason: why it was refused, failed or was interrupted; when the LLM picked, what else there is to know, mostly
            nothing.
        refused_by: the limit that refused; None where none did, also where the budget could not be reached.
        replayed: the LLM picked in an earlier try of this answer, which paid for it; now it was free.
    """

    outcome: Outcome
    reserved: Charge | None
    actual: Charge | None
    wait_s: float
    reason: str = ""
    refused_by: RefusedBy | None = None
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class Asked:
    """A question for the LLM, told as soon as it is over: its step may never come.

    Attributes:
        prefix_tokens: tokens before the step, prompt included.
        candidates: the K candidates, best SLM first.
        report: what became of it.
    """

    prefix_tokens: int
    candidates: tuple[Candidate, ...]
    report: EscalationReport


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds spent in each verb of one step.

    ``queue`` is the wait before a generation's first. ``compute`` is no verb: the step's share of the forwards of the
    SLM that it took part in, divided by rows among all who did. It is what local compute is billed by.
    """

    propose: float = 0.0
    grammar: float = 0.0
    select: float = 0.0
    escalate: float = 0.0
    queue: float = 0.0
    compute: float = 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """One emitted token and how it came about.

    Attributes:
        index: position in the completion, from 0.
        prefix_tokens: tokens before it, prompt included.
        token_id: the token that was chosen.
        wanted_id: the token that the SLM alone would have chosen.
        picked_by: who chose it.
        triggered: the trigger called this step critical.
        entropy: of the SLM's (grammar-masked) next-token distribution, in nats; None for forced tokens.
        candidates: the K candidates, best SLM first; empty where nobody looked twice.
        escalation: set when the selection was to go up to the LLM.
        timings: seconds by verb.
        reused_tokens: of the prompt, whose KV an earlier turn had left; told with the first step, 0 later.
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
    reused_tokens: int = 0

    @property
    def flipped(self) -> bool:
        """The token is another than the SLM wanted."""
        return self.token_id != self.wanted_id


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 is greedy.
        top_p: nucleus mass, in (0, 1]; used when temperature is above 0.
        seed: of the draw; None takes a fresh one.
        max_tokens: upper limit of the completion, in tokens.
        banned_first: token ids that cannot be the first (an empty answer helps nobody).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int = 512
    banned_first: Sequence[int] = ()

    def __post_init__(self) -> None:
        """Refuse what no draw can follow (ConfigError)."""
        if not (isinstance(self.temperature, Real) and math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature is {self.temperature!r}; it must be 0 (greedy) or a positive number.")
        if not (isinstance(self.top_p, Real) and 0 < self.top_p <= 1):
            raise ConfigError(f"top_p is {self.top_p!r}; it must lie in (0, 1].")
        if not (isinstance(self.max_tokens, Integral) and self.max_tokens >= 1):
            raise ConfigError(f"max_tokens is {self.max_tokens!r}; at least 1 token is needed for an answer.")
        if self.seed is not None and not (isinstance(self.seed, Integral) and -(2**63) <= self.seed < 2**64):
            raise ConfigError(f"seed is {self.seed!r}; it must be a whole number of 64 bits.")
